"""A whole small study, in real processes: fresh, continued and failing cells; then again."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from server.folder import RunFolder
from server.results import read_results
from simulations.run.simulate import claimed, record, recorded
from simulations.study.command import fitting, run_study
from simulations.study.grid import grid, load_study
from simulations.study.results import StudyResults
from tests.simulations.runs import stopped

STUDY = """
description = "A small one"
candidate = "deal"
[set]
data.tasks = ["laboratory", "surgery"]
data.max_train = 8
data.max_test = 8
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


def call(folder, **options):
    """Exit code and output of the study ``mine.toml`` of a folder; its cells lie in ``out``."""
    screen = Console(file=io.StringIO(), width=200)
    options = {"out": str(folder / "out"), **options}
    code = run_study(str(folder / "mine.toml"), screen, **options)
    return code, screen.file.getvalue()


def runs_of(folder):
    """Arm to its run."""
    cells = grid(load_study(str(folder / "mine.toml")), folder / "out")
    return {cell.arm: cell.runs[""] for cell in cells}


def without_broken(fork):
    """Starts a fork in the place of a process; one for the arm ``broken`` fails."""

    def start(command, **options):
        if any("broken" in word for word in command):
            fails = "import sys; sys.exit('error: no quorum')"
            return subprocess.Popen([sys.executable, "-c", fails], **options)
        return fork.popen(command, **options)

    return start


@pytest.fixture(scope="module")
def done(tmp_path_factory, fork):
    """The study after its first call: one cell fresh, one continued, one failed."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "mine.toml").write_text(STUDY)
    midway = runs_of(folder)["deal"]  # what it leaves that is stopped in its second task
    record(midway)
    second = {"event": "round_started", "stage": 1}.items()
    stopped(midway, Path(midway.run.out), lambda event: second <= event.items())
    with pytest.MonkeyPatch.context() as patch:
        names = {**vars(subprocess), "Popen": without_broken(fork)}
        patch.setattr("simulations.study.command.subprocess", SimpleNamespace(**names))
        yield folder, *call(folder, jobs=2)


def test_cells_are_run_or_continued_and_one_that_fails_stops_no_other(done):
    folder, code, text = done
    results = StudyResults.model_validate_json((folder / "out/study.json").read_text())
    assert results.wanted == 3
    assert [cell.arm for cell in results.cells] == ["sequential", "deal"]
    (settings,) = results.cells[1].settings.values()
    assert settings["method.prototype.enabled"] == "on"  # what auto has decided
    starts = {"sequential": [(False, 0)], "deal": [(False, 0), (True, 2)]}
    for cell in results.cells:
        own = folder / "out/cells" / f"{cell.arm}.seed0"
        run = read_results(own)
        assert cell.outcome.accuracy_matrix == run.accuracy_matrix
        assert run.config.method.name == cell.arm
        noted = (own / "rows.json").exists()
        assert set(cell.rows) == ({"laboratory", "surgery"} if noted else set())
        page = (own / "report.html").read_text(encoding="utf-8")  # by the real command
        assert f"{cell.arm}.seed0 – Run – deal" in page
        log = map(json.loads, RunFolder(own).metrics.read_text().splitlines())
        began = [e for e in log if e["event"] == "run_started"]
        assert [(e["resumed"], e["done_rounds"]) for e in began] == starts[cell.arm]
    shown = [line.split()[:3] for line in text.splitlines() if line.startswith("deal ")]
    assert shown == [["deal", "1", f"{100 * results.cells[1].outcome.average_accuracy:.1f}"]]
    assert code == 1
    (line,) = [line for line in text.splitlines() if line.startswith("failed: ")]
    assert line.startswith("failed: broken.seed0: no quorum (see ")
    assert "log.txt" in line
    assert "3/3 " in text


def test_again_no_finished_cell_is_run_and_none_under_other_settings(done):
    folder = done[0]
    before = {p: p.stat().st_mtime_ns for p in folder.glob("out/cells/**/*") if p.is_file()}
    # where it runs is no setting
    assert call(folder, only="sequential,deal", overrides=("run.threads=2",))[0] == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(
        UserError, match=r"study: 'adapter.rank' is 4, but the run in .*/sequential"
    ):
        call(folder, overrides=("adapter.rank=4",))


def test_figures_whose_runs_are_gone_are_kept(done, tmp_path):
    figures = (done[0] / "out/study.json").read_text()
    (tmp_path / "study.json").write_text(figures)
    with pytest.raises(UserError, match=r"has figures of sequential\.seed0, and its runs are not"):
        call(done[0], out=str(tmp_path))
    assert (tmp_path / "study.json").read_text() == figures
    (tmp_path / "study.json").write_text(figures[: len(figures) // 2])
    with pytest.raises(UserError, match=r"study\.json: no figures of a study .*; remove it"):
        call(done[0], out=str(tmp_path))


def test_a_run_that_another_process_writes_fails_and_is_left_alone(tmp_path):
    (tmp_path / "mine.toml").write_text(STUDY)
    theirs = runs_of(tmp_path)["deal"]
    train = theirs.train.model_copy(update={"learning_rate": 0.5})
    with claimed(theirs.model_copy(update={"train": train})):
        code, text = call(tmp_path, only="deal")
    assert code == 1
    assert "failed: deal.seed0: " in text
    assert "another process is writing this run" in text
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
def test_every_cell_is_checked_before_anything_starts(tmp_path, old, new, options, message):
    (tmp_path / "mine.toml").write_text(STUDY.replace(old, new))
    with pytest.raises(UserError, match=message):
        call(tmp_path, **options)
    assert not (tmp_path / "out" / "cells").exists()


def test_a_run_whose_clients_kept_their_counts_is_left_out_and_stops_no_other(done):
    folder = done[0]
    results = RunFolder(Path(runs_of(folder)["deal"].run.out)).results
    told = results.read_text()
    results.write_text(json.dumps({**json.loads(told), "accuracy_matrix": []}))
    try:
        code, text = call(folder, only="sequential,deal")
    finally:
        results.write_text(told)
    assert code == 0
    assert "left out: deal.seed0: its clients kept their counts" in text
    table = json.loads((folder / "out/study.json").read_text())
    assert [cell["arm"] for cell in table["cells"]] == ["sequential"]
    call(folder, only="sequential,deal")


def test_jobs_fit_the_cores():
    narrow, wide = (Experiment(run={"threads": each, "workers": each}) for each in (1, 2))
    assert fitting([narrow], 8, 0) == 8
    assert fitting([narrow, wide], 8, 0) == 2
    assert fitting([wide], 1, 0) == 1
    assert fitting([narrow], 8, 2) == 2
    assert fitting([wide], 1, 4) == 1


@pytest.mark.slow
def test_ctrl_c_stops_every_process_and_says_how_to_go_on(tmp_path):
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
