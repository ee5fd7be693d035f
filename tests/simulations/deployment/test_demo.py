"""``deal demo``: whose rows are whose, which processes run, when it ends; and all of it."""

import io
import json
import os
import signal
import subprocess
import time
from contextlib import suppress

import pandas as pd
import psutil
import pytest
from rich.console import Console

from deal_core.config.data import DataConfig
from deal_core.data import open_source
from deal_core.errors import UserError
from server.results import read_results
from simulations.deployment import demo
from simulations.deployment.demo import MARK, NAMES, TASKS, Commands, ended
from simulations.deployment.server.submit import check
from simulations.deployment.site.folder import agreed_labels
from simulations.engines.flower import Tail, members
from simulations.run.experiment import Request, load_experiment
from tests.simulations.deployment.loopback import DEAL, ROOT, SLOW, wait_for


def test_every_question_is_at_one_site_and_the_experiment_is_one_that_can_be_submitted(tmp_path):
    experiment = load_experiment(Request(str(demo.write_shares(tmp_path, NAMES))))
    check(experiment)
    source = open_source(DataConfig(tasks=TASKS))
    whole = {task: source.load(task) for task in TASKS}
    assert agreed_labels(experiment) == {task: data.labels for task, data in whole.items()}
    for task in TASKS:
        for split, rows in (("train", demo.TRAIN_ROWS), ("test", demo.TEST_ROWS)):
            parts = [pd.read_csv(tmp_path / "data" / n / task / f"{split}.csv") for n in NAMES]
            known = {(e.text, e.label) for e in getattr(whole[task], split)}
            found = [(r.text, r.label) for part in parts for r in part.itertuples()]
            assert len(found) == rows == len(set(found))
            assert set(found) <= known
            assert min(map(len, parts)) >= 8


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """Shells in the place of ``deal``."""
    monkeypatch.setattr(Commands, "program", ("bash", "-c"))
    monkeypatch.setattr(demo, "STOP_SECONDS", 0.5)
    return Commands(tmp_path, Console(file=io.StringIO()))


def running(folder):
    return members(folder, MARK)


def gone(process):
    """It runs no more; the machine's first process collects its entry, or does not."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it ended between the two questions
        return True


STUBBORN = "trap '' TERM; (setsid sleep 300 &) ; echo up; while true; do sleep 0.1; done"
"""Refuses to end, and has a child that has left its session and its parent."""


def test_nothing_outlives_the_block(shell):
    seen = []
    with suppress(KeyboardInterrupt), shell:
        shell.start("stubborn", STUBBORN)
        shell.start("mild", "exec sleep 300")
        shell.wait_for(
            "both and the grandchild",
            lambda: (shell.folder / "stubborn.out").read_text() and len(running(shell.folder)) >= 3,
            20,
        )
        seen += running(shell.folder)
        raise KeyboardInterrupt
    assert len(seen) >= 3
    assert running(shell.folder) == []
    assert all(gone(process) for process in seen)


def test_what_ends_by_itself_or_never_comes_is_one_line(shell, tmp_path):
    with shell:
        with pytest.raises(UserError, match=r"no such key$"):
            shell.call("echo error: no such key >&2; exit 2")
        shell.start("mild", "exec sleep 300")
        with pytest.raises(UserError, match=r"the moon: not within 0\.5 s"):
            shell.wait_for("the moon", lambda: False, 0.5)
        shell.start("north", "echo starting; echo error: no such key; exit 2")
        with pytest.raises(UserError, match=r"'north' has ended by itself: error: no such key \("):
            shell.wait_for("nothing", lambda: False, 20)
    stopped = {"event": "run_stopped", "reason": "UserError: too few sites\nmore"}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(stopped) + "\n")
    with pytest.raises(UserError, match=r"the run stopped: too few sites \(its folder"):
        ended(Tail(tmp_path / "metrics.jsonl"), lambda event: None)


def start(folder):
    return subprocess.Popen(
        [*DEAL, "demo", "--dir", str(folder), "--sites", "2"],
        cwd=folder.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.slow
@pytest.mark.timeout(900 * SLOW)
def test_a_whole_run_ends_with_its_report_and_leaves_no_process(tmp_path):
    folder, begun = tmp_path / "demo", time.monotonic()
    process = start(folder)
    seen = wait_for("processes", lambda: running(folder), 120)
    said, _ = process.communicate(timeout=900 * SLOW)
    assert process.returncode == 0, said
    assert time.monotonic() - begun < 300 * SLOW
    assert running(folder) == []
    assert all(map(gone, seen))
    results = read_results(next(folder.glob("server/runs/*")))
    assert results.average_accuracy is not None
    assert results.average_accuracy > sum(results.zero_shot.values()) / len(results.zero_shot)
    assert "average accuracy" in said
    assert "no process is left" in said
    assert len(list(folder.glob("server/runs/*/report.html"))) == 1
    again = start(folder)
    assert "is there already; choose a new folder" in again.communicate(timeout=60 * SLOW)[0]


@pytest.mark.slow
@pytest.mark.timeout(900 * SLOW)
def test_a_signal_stops_all_of_it(tmp_path):
    folder = tmp_path / "demo"
    process = start(folder)

    def begun():
        logs = folder.glob("server/runs/*/metrics.jsonl")
        return any("run_started" in log.read_text() for log in logs)

    wait_for("the run", begun, 240)
    seen = running(folder)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120 * SLOW)
    assert process.returncode == 130, said
    assert "nothing of it runs any more" in said
    assert seen
    assert running(folder) == []
