"""A whole small study, in real processes: fresh, continued and failing cells; then again."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from server.folder import RunFolder
from server.results import read_results
from simulations.engines.inprocess import run_inprocess
from simulations.run.run_folder import claimed, record, recorded
from simulations.study.command import StudyRequest, fitting, numbers, run_study
from simulations.study.grid import grid
from simulations.study.results import StudyResults
from simulations.study.study_file import load_study
from tests.forked import Forker

STUDY = """
description = "A small one"
candidate = "deal"
[set]
data.tasks = ["laboratory", "surgery"]
data.max_train = 16
data.max_test = 16
data.partition.kind = "iid"
federation.clients = 3
federation.rounds = 1
train.max_length = 16
run.threads = 1
run.workers = 1
[arms.sequential]
set.method.name = "sequential"
[arms.broken]
set.adapter.rank = 5
[arms.deal]
set.method.name = "deal"
"""


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def kill_midway(experiment: Experiment) -> None:
    """What a run leaves that is stopped in its second task."""
    record(experiment)

    def interrupt(event: dict[str, object]) -> None:
        if event["event"] == "round_started" and event["stage"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_inprocess(experiment, interrupt)


@pytest.fixture(scope="module")
def one_real(fork: Forker) -> Iterator[None]:
    """Of the processes that are started one imports all by itself, one fails; the others are
    forked."""

    def start(command: list[str], **options: Any) -> Any:
        if any("broken" in word for word in command):
            fails = "import sys; sys.exit('error: no quorum')"
            return subprocess.Popen([sys.executable, "-c", fails], **options)
        real = any("sequential" in word for word in command)
        return subprocess.Popen(command, **options) if real else fork.popen(command, **options)

    with pytest.MonkeyPatch.context() as patch:
        names = {**vars(subprocess), "Popen": start}
        patch.setattr("simulations.study.runs.subprocess", SimpleNamespace(**names))
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, one_real: None) -> tuple[StudyRequest, int, str]:
    """The study after its first call: one cell fresh, one continued, one failed."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "mine.toml").write_text(STUDY)
    request = StudyRequest(str(folder / "mine.toml"), str(folder / "out"), jobs=2)
    arms = {cell.arm: cell for cell in grid(load_study(request.study), folder / "out")}
    kill_midway(arms["deal"].runs[""])
    out = console()
    return request, run_study(request, out), said(out)


def events(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in RunFolder(folder).metrics.read_text().splitlines()]


def test_every_cell_is_in_the_figures(done: tuple[StudyRequest, int, str]) -> None:
    request, _, text = done
    out = Path(request.out)
    results = StudyResults.model_validate_json((out / "study.json").read_text())
    assert results.wanted == 3
    assert [cell.arm for cell in results.cells] == ["sequential", "deal"]
    (settings,) = results.cells[1].settings.values()
    assert settings["method.prototype.enabled"] == "on"  # what auto has decided
    for cell in results.cells:
        folder = out / "cells" / f"{cell.arm}.seed0"
        run = read_results(folder)
        assert cell.outcome.accuracy_matrix == run.accuracy_matrix
        assert run.config.method.name == cell.arm
        noted = (folder / "rows.json").exists()
        assert set(cell.rows) == ({"laboratory", "surgery"} if noted else set())
        page = (folder / "report.html").read_text(encoding="utf-8")  # by the real command
        assert f"{cell.arm}.seed0 – Run – deal" in page
    shown = [line.split()[:3] for line in text.splitlines() if line.startswith("deal ")]
    assert shown == [["deal", "1", f"{100 * results.cells[1].outcome.average_accuracy:.1f}"]]


def test_a_killed_cell_continues_from_its_checkpoint(done: tuple[StudyRequest, int, str]) -> None:
    folder = Path(done[0].out) / "cells" / "deal.seed0"
    starts = [event for event in events(folder) if event["event"] == "run_started"]
    assert [(start["resumed"], start["done_rounds"]) for start in starts] == [(False, 0), (True, 2)]
    fresh = events(folder.with_name("sequential.seed0"))
    assert [e["resumed"] for e in fresh if e["event"] == "run_started"] == [False]


def test_a_failed_cell_is_named_with_its_reason_and_the_others_go_on(
    done: tuple[StudyRequest, int, str],
) -> None:
    _, code, text = done
    assert code == 1
    (line,) = [line for line in text.splitlines() if line.startswith("failed: ")]
    assert line.startswith("failed: broken.seed0: ")
    assert "quorum" in line
    assert "log.txt" in line
    ends = ("3/3 broken.seed0 failed", "3/3 deal.seed0 finished", "3/3 sequential.seed0 finished")
    assert any(end in text for end in ends)


def test_again_no_finished_cell_is_run(done: tuple[StudyRequest, int, str]) -> None:
    request = done[0]
    cells = Path(request.out) / "cells"
    before = {path: path.stat().st_mtime_ns for path in cells.rglob("*") if path.is_file()}
    others = StudyRequest(request.study, request.out, only="sequential,deal")
    assert run_study(others, console()) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_cell_with_other_settings_is_refused(done: tuple[StudyRequest, int, str]) -> None:
    request = done[0]
    other = StudyRequest(request.study, request.out, ("adapter.rank=4",))
    with pytest.raises(
        UserError, match=r"study: 'adapter.rank' is 4, but the run in .*/sequential"
    ):
        run_study(other, console())
    # where it runs is no setting
    threads = ("run.threads=2",)
    only = StudyRequest(request.study, request.out, threads, only="sequential,deal")
    assert run_study(only, console()) == 0


def test_figures_whose_runs_are_gone_are_kept(
    done: tuple[StudyRequest, int, str], tmp_path: Path
) -> None:
    figures = (Path(done[0].out) / "study.json").read_text()
    (tmp_path / "study.json").write_text(figures)
    with pytest.raises(UserError, match=r"has figures of sequential\.seed0, and its runs are not"):
        run_study(replace(done[0], out=str(tmp_path)), console())
    assert (tmp_path / "study.json").read_text() == figures
    (tmp_path / "study.json").write_text(figures[: len(figures) // 2])
    with pytest.raises(UserError, match=r"study\.json: no figures of a study .*; remove it"):
        run_study(replace(done[0], out=str(tmp_path)), console())


def test_a_run_that_another_process_writes_fails_and_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(STUDY)
    request = StudyRequest(str(tmp_path / "mine.toml"), str(tmp_path / "out"), only="deal")
    (cell,) = (c for c in grid(load_study(request.study), tmp_path / "out") if c.arm == "deal")
    theirs = cell.runs[""]
    train = theirs.train.model_copy(update={"learning_rate": 0.5})
    out = console()
    with claimed(theirs.model_copy(update={"train": train})):
        assert run_study(request, out) == 1
    assert "failed: deal.seed0: " in said(out)
    assert "another process is writing this run" in said(out)
    assert recorded(Path(theirs.run.out)).train.learning_rate == 0.5


ONE_TASK = "".join(f'\nstream.orders.{k} = ["laboratory"]' for k in range(3))


@pytest.mark.parametrize(
    ("old", "new", "options", "message"),
    [
        (
            "set.adapter.rank = 5",
            'set.data.partition = { kind = "column", column = "ward" }',
            {},
            "such a column",
        ),
        ("[set]", f'[set]\nstream.schedule = "per-client"{ONE_TASK}', {}, "no client meets"),
        ("[set]", "[set]", {"overrides": ("privacy.metrics=none",)}, r"metrics = \"none\""),
    ],
    ids=["data", "orders", "counts"],
)
def test_every_cell_is_checked_before_anything_starts(
    tmp_path: Path, old: str, new: str, options: dict[str, Any], message: str
) -> None:
    (tmp_path / "mine.toml").write_text(STUDY.replace(old, new))
    request = StudyRequest(str(tmp_path / "mine.toml"), str(tmp_path / "out"), **options)
    with pytest.raises(UserError, match=message):
        run_study(request, console())
    assert not (tmp_path / "out" / "cells").exists()


def test_a_run_whose_clients_kept_their_counts_is_left_out_and_stops_no_other(
    done: tuple[StudyRequest, int, str],
) -> None:
    request, _, _ = done
    cells = grid(load_study(request.study), Path(request.out))
    results = RunFolder(Path(next(c for c in cells if c.arm == "deal").runs[""].run.out)).results
    told = results.read_text()
    results.write_text(json.dumps({**json.loads(told), "accuracy_matrix": []}))
    out, finished = console(), replace(request, only="sequential,deal")
    try:
        assert run_study(finished, out) == 0
    finally:
        results.write_text(told)
    assert "left out: deal.seed0: its clients kept their counts" in said(out)
    table = json.loads((Path(request.out) / "study.json").read_text())
    assert [cell["arm"] for cell in table["cells"]] == ["sequential"]
    run_study(finished, console())


def test_jobs_fit_the_cores() -> None:
    one = Experiment()
    wide = one.model_copy(update={"run": one.run.model_copy(update={"threads": 2, "workers": 2})})
    narrow = one.model_copy(update={"run": one.run.model_copy(update={"threads": 1, "workers": 1})})
    assert fitting([narrow], 8, 0) == 8
    assert fitting([narrow, wide], 8, 0) == 2
    assert fitting([wide], 1, 0) == 1
    assert fitting([narrow], 8, 2) == 2
    assert fitting([wide], 1, 4) == 1


def test_seeds_are_numbers() -> None:
    assert numbers("0, 2,1") == [0, 2, 1]
    assert numbers("") == []
    with pytest.raises(UserError, match="--seeds 0,x: write whole numbers"):
        numbers("0,x")


@pytest.mark.slow
def test_ctrl_c_stops_every_process_and_says_how_to_go_on(tmp_path: Path) -> None:
    text = STUDY.replace("rounds = 1", "rounds = 200")
    (tmp_path / "mine.toml").write_text(text)
    root = Path(__file__).parents[3]
    command = [sys.executable, "-m", "simulations.cli", "study", str(tmp_path / "mine.toml")]
    command += ["--out", str(tmp_path / "out"), "--jobs", "2"]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
    folders = [tmp_path / "out/cells" / f"{arm}.seed0" for arm in ("sequential", "broken")]
    deadline = time.monotonic() + 120
    while not all(RunFolder(f).checkpoint.exists() for f in folders):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.2)
    children = subprocess.run(
        ["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(children) == 2
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    again = f"deal study {tmp_path / 'mine.toml'} --out {tmp_path / 'out'} --jobs 2"
    assert again in [line.strip() for line in stdout.splitlines()]
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(int(child), 0)
