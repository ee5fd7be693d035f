"""A demonstration's parts: whose rows are whose, which folder, which processes, when it ends."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

from deal_core.config.data import DataConfig
from deal_core.data import open_source
from deal_core.errors import UserError
from simulations.deployment.demo import (
    DEFAULT,
    NAMES,
    TASKS,
    TEST_ROWS,
    TRAIN_ROWS,
    Children,
    DemoFolder,
    brief,
    follow,
    new_folder,
    stopped_at_the_end,
    write_files,
    write_shares,
)
from simulations.deployment.server.submit import check
from simulations.deployment.site.folder import agreed_labels
from simulations.run.experiment import Request, load_experiment


def test_every_question_is_at_one_site_and_the_experiment_is_one_that_can_be_submitted(
    tmp_path: Path,
) -> None:
    folder = DemoFolder(tmp_path)
    write_shares(folder, NAMES)
    source = open_source(DataConfig(tasks=TASKS))
    experiment = load_experiment(Request(str(folder.experiment)))
    check(experiment)
    assert list(agreed_labels(experiment)) == list(TASKS)
    for task in TASKS:
        assert agreed_labels(experiment)[task] == source.load(task).labels
        for split, rows in (("train", TRAIN_ROWS), ("test", TEST_ROWS)):
            parts = [pd.read_csv(folder.data(n) / task / f"{split}.csv") for n in NAMES]
            known = {(e.text, e.label) for e in getattr(source.load(task), split)}
            found = [(r.text, r.label) for part in parts for r in part.itertuples()]
            assert len(found) == rows == len(set(found))
            assert set(found) <= known
            assert min(map(len, parts)) >= 8


def test_a_folder_that_cannot_be_written_or_is_taken_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"cannot be written .*; name another folder"):
        write_files(tmp_path / "file" / "demo", 2, 9444)
    write_files(tmp_path / "demo", 2, 9444)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="holds a demonstration already; name a new folder"):
        write_files(tmp_path / "demo", 3, 9444)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_next_free_folder_is_taken_and_none_is_used_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for expected in ("demo-deployment", "demo-deployment-2", "demo-deployment-3"):
        folder = new_folder("")
        assert folder.path == tmp_path / "runs" / expected
        folder.path.mkdir(parents=True)
        assert brief(folder.server.path) == f"runs/{expected}/server"
    with pytest.raises(UserError, match=r"--dir runs/demo-deployment: is there already"):
        new_folder(str(DEFAULT))
    assert new_folder("elsewhere").path == tmp_path / "elsewhere"


@pytest.fixture
def shell(tmp_path: Path) -> Children:
    """Shells in the place of ``deal``."""
    return Children(DemoFolder(tmp_path), ("bash", "-c"), patience=0.5)


def gone(process: psutil.Process) -> bool:
    """It runs no more; the machine's first process collects its entry, or does not."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it ended between the two questions
        return True


def is_sleeping_program(process: psutil.Process) -> bool:
    """Whether it is ``sleep``; one that has ended since it was listed is not."""
    try:
        return process.name() == "sleep"
    except psutil.NoSuchProcess:
        return False


STUBBORN = "trap '' TERM; (setsid sleep 300 &) ; echo up; while true; do sleep 0.1; done"
"""Refuses to end, and has a child that has left its session and its parent."""


@pytest.mark.parametrize(
    "how",
    [
        *(pytest.param(how, marks=pytest.mark.slow) for how in (None, RuntimeError("anything"))),
        KeyboardInterrupt(),
    ],
)
def test_nothing_outlives_the_block_however_it_is_left(
    shell: Children, how: BaseException | None
) -> None:
    running: list[psutil.Process] = []
    caught: BaseException | None = None
    try:
        with stopped_at_the_end(shell):
            shell.start("stubborn", STUBBORN)
            shell.start("mild", "exec sleep 300")
            shell.wait_for(
                "both and the grandchild",
                lambda: sum(map(is_sleeping_program, shell.alive())) >= 2,
                20,
            )
            running = shell.alive()
            if how is not None:
                raise how
    except (RuntimeError, KeyboardInterrupt) as error:
        caught = error
    assert caught is how
    assert len(running) >= 3
    assert shell.alive() == []
    assert all(gone(process) for process in running)


def test_a_process_that_ends_by_itself_is_named_with_its_last_word(shell: Children) -> None:
    with stopped_at_the_end(shell):
        shell.start("north", "echo starting; echo error: no such key; exit 2")
        with pytest.raises(
            UserError, match=r"'north' has ended by itself: error: no such key \(log"
        ):
            shell.wait_for("nothing", lambda: False, 20)


def test_what_never_comes_is_waited_for_so_long(shell: Children) -> None:
    started = time.monotonic()
    with stopped_at_the_end(shell):
        shell.start("mild", "exec sleep 300")
        with pytest.raises(UserError, match=r"the moon: not within 0\.5 s"):
            shell.wait_for("the moon", lambda: False, 0.5)
    assert time.monotonic() - started < 15


def write_events(run: Path, *events: dict[str, object]) -> Path:
    run.mkdir()
    lines = "".join(json.dumps({"time": 0.0, **event}) + "\n" for event in events)
    (run / "metrics.jsonl").write_text(lines)
    return run


def test_a_run_that_stops_ends_the_demonstration_with_its_reason(
    shell: Children, tmp_path: Path
) -> None:
    stopped = {"event": "run_stopped", "reason": "UserError: too few sites\nmore"}
    run = write_events(tmp_path / "run", stopped)
    with pytest.raises(UserError, match=r"the run stopped: too few sites \(its folder"):
        follow(shell, run, lambda event: None, seconds=20)


def test_a_run_may_take_so_long_and_no_longer(shell: Children, tmp_path: Path) -> None:
    run = write_events(tmp_path / "run")
    with pytest.raises(UserError, match=r"has not finished within 0\.3 s"):
        follow(shell, run, lambda event: None, seconds=0.3)
