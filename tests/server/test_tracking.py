"""TensorBoard beside a run: what it holds is what the run has found, and nothing is sent."""

import sys
from types import SimpleNamespace

from deal_core.config.experiment import Experiment
from server import folder
from server.folder import EventLog, read_events, tracked


def test_a_tracker_that_fails_costs_nothing_of_the_run(tmp_path, monkeypatch):
    class Broken:
        def __init__(self, *given, **more):
            self.told = 0

        def add_text(self, *given):
            pass

        def add_scalar(self, *given):
            self.told += 1
            assert self.told == 1, "no more than one"

        def close(self):
            raise AssertionError("nor can it be closed")

    module = SimpleNamespace(SummaryWriter=Broken)
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
