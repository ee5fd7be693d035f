"""TensorBoard beside a run: what it holds is what the run has found, and nothing is sent."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from deal_core.config.experiment import Experiment
from server import folder
from server.folder import EventLog, figures_of, read_events, tracked

READER = """
import json
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator({!r}, size_guidance={{"scalars": 0}}).Reload()
names = events.Tags()["scalars"]
print(json.dumps({{name: [[e.step, e.value] for e in events.Scalars(name)] for name in names}}))
"""
RUNS = """
import json, socket, sys
from deal_core.config.experiment import Experiment
from server.folder import EventLog, tracked
from pathlib import Path
connect = socket.socket.connect
def guarded(self, address):
    assert self.family == socket.AF_UNIX, address
    return connect(self, address)
socket.socket.connect = guarded
out = Path(sys.argv[1])
log = EventLog(out / "metrics.jsonl")
for number, resume in enumerate((False, True), start=1):
    experiment = Experiment.model_validate({"run": {"track": "tensorboard", "resume": resume}})
    with tracked(experiment, out / "tracking", log) as events:
        events.write("evaluated", round=number, stage=number - 2, accuracy={"a": number / 4})
        if resume:
            raise SystemExit
"""
"""A run that is resumed, and ends before its time, in a process that may call nobody."""


def test_it_holds_what_a_resumed_run_has_found_and_calls_nobody(tmp_path):
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    out.mkdir()
    subprocess.run([sys.executable, "-c", RUNS, str(out)], check=True)
    assert [event for event in read_events(out / "metrics.jsonl") if "tracker" in event] == []
    program = READER.format(str(out / "tracking" / "tensorboard"))
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    found = json.loads(told.stdout.splitlines()[-1])
    assert found == {"accuracy/a": [[0, 0.25], [2, 0.5]]}  # what the start knows is step 0


def test_a_tracker_that_fails_costs_nothing_of_the_run(tmp_path, monkeypatch):
    told = []

    def add_scalar(*given):
        told.append(given)
        assert len(told) == 1, "no more than one"

    def close():
        raise AssertionError("nor can it be closed")

    broken = SimpleNamespace(add_text=print, add_scalar=add_scalar, close=close)
    module = SimpleNamespace(SummaryWriter=lambda *given, **more: broken)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(folder, "check_tracker", lambda experiment: None)
    heard = []
    log = EventLog(tmp_path / "metrics.jsonl", heard.append)
    experiment = Experiment.model_validate({"run": {"track": "tensorboard"}})
    with tracked(experiment, tmp_path / "tracking", log) as events:
        for number in (1, 2, 3):
            events.write("evaluated", round=number, accuracy={"a": number / 4})
    written = read_events(log.path)
    (failed,) = [event for event in written if event["event"] == "tracking_failed"]
    assert "no more than one" in failed["reason"]
    assert [each["event"] for each in written].count("evaluated") == 3
    assert heard == written


@pytest.mark.parametrize(
    ("event", "drawn"),
    [
        ({"event": "round_finished", "seconds": 2.0, "excluded": []}, {"round/seconds": 2.0}),
        ({"event": "client_finished", "client": "1", "loss": 0.5}, {"loss/1": 0.5}),
        ({"event": "client_finished", "client": "1", "epsilon": 2.0}, {}),
        ({"event": "loss_summed", "loss": 1.5}, {"loss/sum": 1.5}),
        ({"event": "run_finished", "forgetting": None}, {}),
        ({"event": "run_started", "clients": 3}, {}),
    ],
)
def test_what_is_drawn_of_an_event(event, drawn):
    assert figures_of(event) == drawn
