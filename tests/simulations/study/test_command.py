"""A whole small study, in real processes: fresh, continued and failing cells; then again."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
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
from simulations.study import command as study_command
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
data.partition.kind = "pathological"
federation.clients = 3
federation.rounds = 1
train.max_length = 16
run.threads = 1
run.workers = 1
[arms.sequential]
set.method.name = "sequential"
[arms.broken]
set.faults = { kind = "not-finite", clients = [0, 1, 2] }
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
    """Of the processes that are started one imports all by itself; the others are forked."""

    def start(command: list[str], **options: Any) -> Any:
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


def test_every_cell_is_in_the_tables(done: tuple[StudyRequest, int, str]) -> None:
    request, _, _ = done
    out = Path(request.out)
    results = StudyResults.model_validate_json((out / "study.json").read_text())
    assert results.wanted == 3
    assert [cell.arm for cell in results.cells] == ["sequential", "deal"]
    for cell in results.cells:
        run = read_results(out / "cells" / f"{cell.arm}.seed0")
        assert cell.outcome.accuracy_matrix == run.accuracy_matrix
        assert run.config.method.name == cell.arm
        noted = (out / "cells" / f"{cell.arm}.seed0" / "data.json").exists()
        assert set(cell.rows) == ({"laboratory", "surgery"} if noted else set())
    for arm in ("sequential", "deal"):  # runs of their own, by the real command
        text = (out / "cells" / f"{arm}.seed0" / "report.html").read_text(encoding="utf-8")
        assert f"{arm}.seed0 – Run – deal" in text
    page = (out / "study.md").read_text()
    assert "2 of 3 cells done" in page
    assert f"| deal | 1 | {100 * results.cells[1].outcome.average_accuracy:.1f} |" in page


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
    page = Path(request.out) / "study.md"
    page.unlink()
    others = StudyRequest(request.study, request.out, arms="sequential,deal")
    assert run_study(others, console()) == 0
    assert page.exists()
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_every_cells_data_is_checked_before_anything_starts(tmp_path: Path) -> None:
    text = STUDY.replace(
        "set.faults", 'set.data.partition = { kind = "column", column = "ward" } #'
    )
    (tmp_path / "mine.toml").write_text(text)
    request = StudyRequest(str(tmp_path / "mine.toml"), str(tmp_path / "out"))
    with pytest.raises(UserError, match="such a column"):
        run_study(request, console())
    assert not (tmp_path / "out" / "cells").exists()


def test_a_cell_with_other_settings_is_refused(done: tuple[StudyRequest, int, str]) -> None:
    request = done[0]
    other = StudyRequest(request.study, request.out, ("adapter.rank=4",), report=True)
    with pytest.raises(
        UserError, match=r"study: 'adapter.rank' is 4, but the run in .*/sequential"
    ):
        run_study(other, console())
    # where it runs is no setting
    threads = StudyRequest(request.study, request.out, ("run.threads=2",), report=True)
    assert run_study(threads, console()) == 0


def test_the_figures_alone_carry_the_study_on(
    done: tuple[StudyRequest, int, str], tmp_path: Path
) -> None:
    request = done[0]
    figures = (Path(request.out) / "study.json").read_text()
    (tmp_path / "study.json").write_text(figures)
    elsewhere = StudyRequest(
        request.study, str(tmp_path), ("run.threads=2",), arms="sequential,deal"
    )
    assert run_study(elsewhere, console()) == 0
    assert not (tmp_path / "cells").exists()
    assert (tmp_path / "study.json").read_text() == figures
    assert "2 of 3 cells done" in (tmp_path / "study.md").read_text()
    other = StudyRequest(request.study, str(tmp_path), ("adapter.rank=4",), arms="deal")
    with pytest.raises(UserError, match=r"study\.json: 'adapter\.rank' is 4, but the cell sequen"):
        run_study(other, console())
    assert (tmp_path / "study.json").read_text() == figures
    # a precision that the study leaves to the machine was what that machine has
    there = json.loads(figures)
    used = there["cells"][0]["settings"][""]["train.precision"]
    assert used in {"float32", "bfloat16"}
    assert f"Frozen model: {used} (seeds [0])." in (tmp_path / "study.md").read_text()
    there["cells"][0]["settings"][""]["train.precision"] = "bfloat16"
    (tmp_path / "study.json").write_text(json.dumps(there))
    assert run_study(elsewhere, console()) == 0
    fixed = replace(elsewhere, overrides=("train.precision=float32",))
    with pytest.raises(UserError, match=r"'train\.precision' is \"float32\", but the cell sequen"):
        run_study(fixed, console())
    # a setting that did not exist yet was its default; a default that was another one matters
    older = json.loads(figures)
    del older["defaults"]["aggregation.rank_cap"]
    (tmp_path / "study.json").write_text(json.dumps(older))
    assert run_study(elsewhere, console()) == 0
    older["defaults"]["aggregation.rank_cap"] = 1
    (tmp_path / "study.json").write_text(json.dumps(older))
    with pytest.raises(UserError, match=r"'aggregation\.rank_cap' is 0, but the cell .* with 1"):
        run_study(elsewhere, console())
    (tmp_path / "study.json").write_text(figures[: len(figures) // 2])
    with pytest.raises(UserError, match=r"study\.json: no figures of a study .*; remove it"):
        run_study(elsewhere, console())


def test_what_the_study_no_longer_has_stays_in_the_file_and_in_no_table(
    done: tuple[StudyRequest, int, str], tmp_path: Path
) -> None:
    """It may be all that is left of those runs."""
    request = done[0]
    figures = json.loads((Path(request.out) / "study.json").read_text())
    figures["defaults"]["aggregation.rank_cap"] = 1  # then; of what is still asked for, it was set
    next(c for c in figures["cells"] if c["arm"] == "deal")["settings"][""][
        "aggregation.rank_cap"
    ] = 0
    (tmp_path / "study.json").write_text(json.dumps(figures))
    text = STUDY.replace('[arms.sequential]\nset.method.name = "sequential"\n', "")
    (tmp_path / "mine.toml").write_text(text)
    fewer = StudyRequest(str(tmp_path / "mine.toml"), str(tmp_path), report=True)
    assert run_study(fewer, console()) == 0
    results = StudyResults.model_validate_json((tmp_path / "study.json").read_text())
    assert [cell.arm for cell in results.cells] == ["deal", "sequential"]
    assert results.defaults["aggregation.rank_cap"] == 0
    assert [cell.settings[""].get("aggregation.rank_cap") for cell in results.cells] == [None, 1]
    page = (tmp_path / "study.md").read_text()
    assert "1 of 2 cells done" in page
    assert "sequential" not in page
    (tmp_path / "other.toml").write_text(text)
    other = StudyRequest(str(tmp_path / "other.toml"), str(tmp_path), report=True)
    with pytest.raises(UserError, match="holds the study mine; choose another --out"):
        run_study(other, console())


def test_a_bound_over_other_tasks_is_another_cell(
    done: tuple[StudyRequest, int, str], tmp_path: Path
) -> None:
    text = STUDY + '[arms.alone]\nbound = "per-task"\n'
    (tmp_path / "mine.toml").write_text(text)
    figures = json.loads((Path(done[0].out) / "study.json").read_text())
    cell = figures["cells"][0] | {"arm": "alone", "bound": "per-task"}
    usual = cell["settings"][""]
    names = ("laboratory", "surgery", "medicine")
    cell["settings"] = {name: {**usual, "data.tasks": json.dumps([name])} for name in names}
    (tmp_path / "study.json").write_text(json.dumps(figures | {"cells": [cell]}))
    request = StudyRequest(str(tmp_path / "mine.toml"), str(tmp_path), report=True)
    with pytest.raises(UserError, match=r"made of the runs .*but was found with .*medicine"):
        run_study(request, console())


def test_what_a_method_left_to_the_experiment_is_recorded_in_so_many_words(
    done: tuple[StudyRequest, int, str], tmp_path: Path
) -> None:
    """What a later version decides otherwise is another cell."""
    (tmp_path / "mine.toml").write_text(STUDY)
    figures = json.loads((Path(done[0].out) / "study.json").read_text())
    (settings,) = next(c for c in figures["cells"] if c["arm"] == "deal")["settings"].values()
    assert settings["method.prototype.enabled"] == "on"
    request = StudyRequest(str(tmp_path / "mine.toml"), str(tmp_path), report=True)
    for enabled in ("auto", "on", "off"):  # as an earlier version wrote it, as it was, otherwise
        settings["method.prototype.enabled"] = enabled
        (tmp_path / "study.json").write_text(json.dumps(figures))
        if enabled != "off":
            assert run_study(request, console()) == 0
    with pytest.raises(UserError, match=r'is "auto", but the cell deal.seed0 was run with "off"'):
        run_study(request, console())


def test_the_precision_is_that_of_the_machine_that_ran(
    done: tuple[StudyRequest, int, str], tmp_path: Path
) -> None:
    request, run = done[0], "cells/sequential.seed0"
    shutil.copytree(Path(request.out) / run, tmp_path / run)
    path = RunFolder(tmp_path / run).results
    results = json.loads(path.read_text())
    used = results["config"]["train"]["precision"]
    other = {"float32": "bfloat16", "bfloat16": "float32"}[used]
    results["config"]["train"]["precision"] = other
    path.write_text(json.dumps(results))
    assert run_study(replace(request, out=str(tmp_path), report=True), console()) == 0
    assert f"Frozen model: {other} (seeds [0])." in (tmp_path / "study.md").read_text()


def test_a_run_that_another_process_writes_fails_and_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(STUDY)
    request = StudyRequest(str(tmp_path / "mine.toml"), str(tmp_path / "out"), arms="deal")
    (cell,) = (c for c in grid(load_study(request.study), tmp_path / "out") if c.arm == "deal")
    theirs = cell.runs[""]
    train = theirs.train.model_copy(update={"learning_rate": 0.5})
    out = console()
    with claimed(theirs.model_copy(update={"train": train})):
        assert run_study(request, out) == 1
    assert "failed: deal.seed0: " in said(out)
    assert "another process is writing this run" in said(out)
    assert recorded(Path(theirs.run.out)).train.learning_rate == 0.5


def test_every_seed_is_checked_before_anything_starts(tmp_path: Path) -> None:
    """Two clients with one of two tasks each: with seed 0 both draw the same one."""
    text = STUDY.replace(
        "[set]",
        'seeds = [0, 4]\n[set]\nstream.schedule = "per-client"\nstream.tasks_per_client = 1',
    )
    (tmp_path / "mine.toml").write_text(text)
    request = StudyRequest(str(tmp_path / "mine.toml"), str(tmp_path / "out"), arms="deal")
    with pytest.raises(UserError, match="no client meets"):
        run_study(request, console())
    assert not (tmp_path / "out" / "cells").exists()


def test_without_counts_there_is_nothing_to_compare(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(STUDY)
    overrides = ("privacy.metrics=none",)
    request = StudyRequest(str(tmp_path / "mine.toml"), str(tmp_path / "out"), overrides)
    with pytest.raises(UserError, match=r"privacy\.metrics = \"none\""):
        run_study(request, console())
    assert not (tmp_path / "out" / "cells").exists()


def test_results_that_cannot_be_used_are_named_and_stop_no_other_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run_all(left: Mapping[str, Experiment], jobs: int, started: Any, ended: Any) -> None:
        for name in left:
            started(name)
            ended(name, "")

    faults = iter(["one: no accuracies", ""])

    def renew() -> None:
        if fault := next(faults):
            raise UserError(fault)

    monkeypatch.setattr(study_command, "run_all", run_all)
    left = {"one": Experiment(), "two": Experiment()}
    failures = study_command.run_left(left, tmp_path, 1, ["deal"], renew, Console(quiet=True))
    assert failures == {"one": "one: no accuracies"}


def test_a_run_whose_clients_kept_their_counts_is_left_out_and_stops_no_other(
    done: tuple[StudyRequest, int, str],
) -> None:
    request, _, _ = done
    cells = grid(load_study(request.study), Path(request.out))
    results = RunFolder(Path(next(c for c in cells if c.arm == "deal").runs[""].run.out)).results
    told = results.read_text()
    results.write_text(json.dumps({**json.loads(told), "accuracy_matrix": []}))
    (Path(request.out) / "study.json").unlink()
    out = console()
    try:
        assert run_study(replace(request, report=True), out) == 0
    finally:
        results.write_text(told)
    assert "left out: deal.seed0: its clients kept their counts" in said(out)
    table = json.loads((Path(request.out) / "study.json").read_text())
    assert [cell["arm"] for cell in table["cells"]] == ["sequential"]
    run_study(replace(request, report=True), console())


def test_a_method_that_finds_no_room_is_refused_before_anything_starts(tmp_path: Path) -> None:
    lines = STUDY.replace(
        "[arms.deal]", '[arms.full]\nset.method.name = "olora"\nset.adapter.rank = 200\n[arms.deal]'
    )
    (tmp_path / "mine.toml").write_text(lines)
    request = StudyRequest(str(tmp_path / "mine.toml"), str(tmp_path / "out"), arms="full")
    with pytest.raises(UserError, match="no room for"):
        run_study(request, console())
    assert not (tmp_path / "out" / "cells").exists()


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
    text = STUDY.replace("clients = [0, 1]", "clients = []").replace("rounds = 1", "rounds = 200")
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
    assert stdout.splitlines()[-1].strip() == (
        f"deal study {tmp_path / 'mine.toml'} --out {tmp_path / 'out'} --jobs 2"
    )
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(int(child), 0)
