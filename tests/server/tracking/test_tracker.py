"""Trackers beside real runs: what they hold is what the run has found, and nobody is called.

A tracker's package is needed for its part: the extras `tensorboard`, `mlflow`, `trackio`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from server.folder import EventLog, read_events
from server.results import read_results
from server.tracking import tracker
from server.tracking.tracker import TRACKERS, check_tracker, tracked
from simulations.engines.inprocess import run_inprocess
from tests.simulations.runs import at

READERS = {
    "tensorboard": """
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
runs = 1
names = events.Tags()["scalars"]
found = {name: [[event.step, event.value] for event in events.Scalars(name)] for name in names}
settings, status = "settings/text_summary" in events.Tags()["tensors"], ""
""",
    "mlflow": """
from mlflow import MlflowClient
client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
(experiment,) = [e for e in client.search_experiments() if e.name == "federated-deal"]
all_runs = client.search_runs([experiment.experiment_id])
runs, run = len(all_runs), all_runs[0]
found = {
    name: [[m.step, m.value] for m in client.get_metric_history(run.info.run_id, name)]
    for name in run.data.metrics
}
settings, status = run.data.params["method.name"] == "sequential", run.info.status
""",
    "trackio": """
import trackio
from trackio.sqlite_storage import SQLiteStorage
api = trackio.Api()
all_runs = list(api.runs("federated-deal"))
runs, run = len(all_runs), all_runs[0]
found = {}
for row in SQLiteStorage.get_logs(run.project, run.name, run_id=run.id):
    for name in row.keys() - {"step", "timestamp"}:
        found.setdefault(name, []).append([row["step"], row[name]])
settings, status = run.config["method.name"] == "sequential", ""
""",
}
"""Programs that read a tracker's folder with its own package."""
GUARD = """
import socket
connect = socket.socket.connect
def asked(what):
    with open({path!r}, "a") as file:
        print(what, file=file)
def guarded(self, address):
    if self.family != socket.AF_UNIX:
        asked(address)
    return connect(self, address)
socket.socket.connect = guarded
"""
needed = pytest.mark.parametrize("name", TRACKERS)


def read(name: str, folder: Path) -> dict[str, Any]:
    """Figures by name as pairs of step and value, the number of runs, and what else is known."""
    show = "import json; print(json.dumps([found, runs, settings, status]))"
    program = f"folder = {str(folder)!r}\n{READERS[name]}\n{show}"
    told = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRACKIO_DIR": str(folder)},
    )
    assert told.returncode == 0, told.stderr
    keys = ("figures", "runs", "settings", "status")
    return dict(zip(keys, json.loads(told.stdout.splitlines()[-1]), strict=True))


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """The addresses that processes started in the test have connected to."""
    guard, log = tmp_path / "guard", tmp_path / "calls.txt"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(GUARD.format(path=str(log)))
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(guard), before))))
    return lambda: log.read_text() if log.exists() else ""


def needs(name: str) -> None:
    for package in TRACKERS[name]:
        pytest.importorskip(package)


def quiet(event: object) -> None:
    """A listener."""


@needed
def test_it_holds_what_the_run_has_found_and_calls_nobody(
    name: str,
    tmp_path: Path,
    make_experiment: Callable[..., Experiment],
    calls: Callable[[], str],
) -> None:
    needs(name)
    settings = ("method.name=sequential", "federation.rounds=1")
    folder = tmp_path / "run"
    run_inprocess(at(make_experiment(*settings), folder, track=name), quiet)
    results = read_results(folder)
    held = read(name, folder / "tracking" / name)
    assert [event for event in read_events(folder / "metrics.jsonl") if "tracker" in event] == []
    figures = held["figures"]
    for column, task in enumerate(results.tasks):
        values = [results.zero_shot[task], *(row[column] for row in results.accuracy_matrix)]
        assert figures[f"accuracy/{task}"] == [
            [step, pytest.approx(value)] for step, value in enumerate(values)
        ]
    assert [step for step, _ in figures["train/loss"]] == [1, 2]
    ((step, average),) = figures["final/average_accuracy"]
    assert (step, average) == (2, pytest.approx(results.average_accuracy))
    assert held["runs"] == 1
    assert held["settings"]
    assert held["status"] in ("", "FINISHED")
    assert calls() == ""


def test_a_call_would_be_seen(calls: Callable[[], str]) -> None:
    program = (
        "import socket; socket.socket().connect_ex; socket.create_connection(('127.0.0.1', 9))"
    )
    subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert "127.0.0.1" in calls()


@needed
def test_a_resumed_run_goes_on_in_the_same_place(
    name: str, tmp_path: Path, make_experiment: Callable[..., Experiment]
) -> None:
    needs(name)
    experiment = make_experiment("method.name=sequential", f"run.track={name}")
    log = EventLog(tmp_path / "metrics.jsonl")
    for number, resume in enumerate((False, True), start=1):
        again = experiment.run.model_copy(update={"resume": resume})
        changed = experiment.model_copy(update={"run": again})
        with tracked(changed, tmp_path / "tracking", log) as events:
            events.write("evaluated", round=number, stage=0, accuracy={"a": number / 4})
    held = read(name, tmp_path / "tracking" / name)
    assert held["figures"]["accuracy/a"] == [[1, 0.25], [2, 0.5]]
    assert held["runs"] == 1
    assert held["status"] in ("", "FAILED")  # it never said that it had finished


def test_a_tracker_that_fails_costs_nothing_of_the_run(
    tmp_path: Path, make_experiment: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "TRACKERS", {"tensorboard": ()})
    monkeypatch.setattr(tracker.sys, "executable", "/bin/false")
    heard: list[dict[str, Any]] = []
    experiment = make_experiment("federation.rounds=1", 'data.tasks=["surgery"]')
    run_inprocess(at(experiment, tmp_path / "run", track="tensorboard"), heard.append)
    assert read_results(tmp_path / "run").average_accuracy is not None
    written = read_events(tmp_path / "run/metrics.jsonl")
    assert [event["event"] for event in written[-2:]] == ["run_finished", "tracking_failed"]
    assert "exit code 1" in written[-1]["reason"]
    assert heard == written


def test_a_tracker_that_reads_nothing_holds_up_nothing(
    tmp_path: Path, make_experiment: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Far more than a pipe holds is told to it."""
    deaf = tmp_path / "deaf"
    deaf.write_text("#!/bin/sh\nexec sleep 600\n")
    deaf.chmod(0o755)
    monkeypatch.setattr(tracker, "TRACKERS", {"tensorboard": ()})
    monkeypatch.setattr(tracker.sys, "executable", str(deaf))
    monkeypatch.setattr(tracker, "CLOSING_SECONDS", 0.5)
    experiment = at(make_experiment(), tmp_path / "run", track="tensorboard")
    log = EventLog(tmp_path / "metrics.jsonl")
    started = time.monotonic()
    with tracked(experiment, tmp_path / "tracking", log) as events:
        for number in range(200):
            wide = {f"task {task}": 0.5 for task in range(100)}
            events.write("evaluated", round=number, stage=0, accuracy=wide)
    assert time.monotonic() - started < 30
    last = read_events(tmp_path / "metrics.jsonl")[-1]
    assert (last["event"], last["reason"].partition(";")[0]) == ("tracking_failed", "exit code -9")


def test_without_its_package_nothing_starts(
    make_experiment: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        check_tracker(make_experiment("run.track=trackio"))
    assert str(error.value) == (
        "run.track = 'trackio' needs trackio, which is not installed; run "
        "pip install --editable '.[trackio]' in the checkout, or leave run.track out"
    )
    check_tracker(make_experiment())


def test_the_run_itself_needs_no_tracker(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "metrics.jsonl")
    with tracked(Experiment(), tmp_path / "tracking", log) as events:
        assert events is log
    assert not (tmp_path / "tracking").exists()
