"""The real thing in small: real model, real data, the real Flower apps, in one process."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from server.folder import RunFolder
from server.results import read_results
from tests.simulations.runs import (
    assert_same_run,
    at,
    learnt_adapter,
    run_in_process,
    simulated,
    stopped,
)
from tests.sizes import TINY

pytestmark = pytest.mark.usefixtures("one_model")


@dataclass
class Finished:
    """A run, and all that left its clients: record, field and type."""

    experiment: Experiment
    folder: Path
    events: list[dict[str, Any]] = field(default_factory=list)
    left: set[str] = field(default_factory=set)


@pytest.fixture(scope="module")
def finished(make_experiment, tmp_path_factory, one_model):
    folder = tmp_path_factory.mktemp("finished")
    ran = Finished(at(make_experiment(*TINY), folder), folder)

    def see(reply):
        for name, record in reply.content.items():
            for key, value in record.items():
                kind = "adapter" if isinstance(value, Array) else type(value).__name__
                ran.left.add(f"{name}.{'*' if kind == 'adapter' else key}: {kind}")
                assert kind != "adapter" or key.endswith((".lora_A.weight", ".lora_B.weight"))
        return reply

    ran.events = run_in_process(ran.experiment, see)
    return ran


def test_a_run_leaves_valid_results(finished):
    experiment, folder, events = finished.experiment, finished.folder, finished.events
    results = read_results(folder)
    assert results.config == experiment
    assert results.tasks == ["laboratory", "surgery"]
    assert np.array(results.accuracy_matrix).shape == (2, 2)
    assert [e["event"] for e in events].count("round_finished") == 4
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert logged == events


def test_among_all_labels_seen_so_far_nobody_is_right_more_often(finished):
    results = read_results(finished.folder)
    among_all = results.class_incremental
    own, every = np.array(results.accuracy_matrix), np.array(among_all.accuracy_matrix)
    assert every.shape == own.shape
    assert (every <= own).all()
    assert every[0, 0] == own[0, 0]  # task 1 alone is learnt: there are no other labels
    assert (every < own).any()
    assert among_all.zero_shot == results.zero_shot
    assert among_all.per_client.keys() == results.per_client.keys()


def test_nothing_but_adapters_and_figures_leaves_a_client(finished):
    """Every field of every reply, by name and type."""
    assert finished.left == {
        "site.client: int",
        "status.code: str",
        "status.stage: int",
        "status.phase: str",
        "status.server_round: int",
        "lora.*: adapter",
        "metrics.num_examples: int",
        "metrics.loss: float",
        "metrics.seconds: float",
        "metrics.correct: list",
        "metrics.correct_all: list",
        "metrics.examples: list",
    }


def cut_short(folder):
    folder.checkpoint.write_bytes(folder.checkpoint.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("steps", "damage", "told"),
    [
        pytest.param(1, lambda folder: None, None, marks=pytest.mark.slow),
        (2, cut_short, "damaged checkpoint"),
        (3, lambda folder: folder.checkpoint.unlink(), "no checkpoint to resume from"),
    ],
    ids=["whole", "damaged", "missing"],
)
def test_stopped_anywhere_and_resumed_equals_uninterrupted(finished, tmp_path, steps, damage, told):
    """Interrupt in the middle of a step, 3 of them at the border of two tasks; the checkpoint
    before it stands, and where that is damaged, the one before. So equal seeds give equal runs."""
    experiment, folder = finished.experiment, finished.folder
    ended = {"round_finished", "stage_finished"}
    seen = []

    def in_the_step(event):
        seen.extend({event["event"]} & ended)
        return len(seen) == steps and event["event"] in {"client_finished", "round_finished"}

    stopped(experiment, tmp_path, in_the_step)
    damage(RunFolder(tmp_path))
    events = []
    simulated(experiment, tmp_path, events.append, resume=True)
    reasons = [e["reason"] for e in events if e["event"] == "checkpoint_damaged"]
    assert [told in each for each in reasons] == [True] * (told is not None)
    assert_same_run(folder, tmp_path)


PROGRAM = """
import sys
import time
from pathlib import Path
from deal_core.config.experiment import Experiment
from simulations.engines.inprocess import run_inprocess

heard = []


def listen(event):
    heard.append(event["event"])
    if heard.count("client_finished") == 3:
        time.sleep(600)  # until it is killed


run_inprocess(Experiment.model_validate_json(Path(sys.argv[1]).read_text()), listen)
"""


def test_killed_and_resumed_equals_uninterrupted(fork, finished, tmp_path):
    """SIGKILL to a real process in the middle of a round."""
    experiment, folder = finished.experiment, finished.folder
    (tmp_path / "experiment.json").write_text(at(experiment, tmp_path).model_dump_json())
    (tmp_path / "program.py").write_text(PROGRAM)
    process = fork(str(tmp_path / "program.py"), str(tmp_path / "experiment.json"))
    log = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("client_finished") >= 3):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (tmp_path / "results.json").exists()
    simulated(experiment, tmp_path, resume=True)
    assert_same_run(folder, tmp_path)


def spoil(kind, reply):
    """Turn a good update into a bad one."""
    record = reply.content["lora"]
    key = next(iter(record))
    good = record[key].numpy()
    if kind == "silent":
        return None
    if kind == "nan":
        record[key] = Array(np.full_like(good, np.nan))
    if kind == "broadcastable":
        record[key] = Array(good[:1])
    if kind == "extra key":
        record["classifier.weight"] = Array(good)
    if kind == "text":
        reply.content["notes"] = ConfigRecord({"question": "what was asked"})
    if kind == "wrong round":
        reply.content["status"]["server_round"] = 70
    if kind == "negative weight":
        reply.content["metrics"] = MetricRecord({"num_examples": -5, "loss": 0.1, "seconds": 1.0})
    if kind == "huge weight":
        reply.content["metrics"]["num_examples"] = 10**12
    if kind == "no weight":
        reply.content["metrics"] = MetricRecord({"loss": 0.1})
    if kind == "no adapter":
        reply.content["lora"] = ArrayRecord()
    return reply


KINDS = [
    "nan",
    "broadcastable",
    "extra key",
    "text",
    "wrong round",
    "negative weight",
    "huge weight",
    "no weight",
    "no adapter",
    "silent",
]


def test_a_bad_reply_costs_its_sender_the_round_and_nobody_else(make_experiment, tmp_path):
    """Another kind of reply in every round, always by the first who answers."""
    experiment = make_experiment(
        *TINY,
        'data.tasks=["surgery"]',
        f"federation.rounds={len(KINDS)}",
        "federation.deadline_seconds=0.3",
    )
    left = list(KINDS)

    def bad(reply):
        if not reply.has_content() or "lora" not in reply.content.array_records:
            return reply
        due = KINDS[reply.content["status"]["server_round"] - 1]
        if due not in left:
            return reply
        left.remove(due)
        return spoil(due, reply)

    events = run_in_process(at(experiment, tmp_path), bad)
    failed = [e for e in events if e["event"] == "client_failed"]
    assert [e["server_round"] for e in failed] == list(range(1, len(KINDS) + 1))
    assert all(e["reason"] for e in failed)
    assert [e["clients"] for e in events if e["event"] == "round_finished"] == [1] * len(KINDS)
    assert all(np.isfinite(value).all() for value in learnt_adapter(tmp_path).values())


def test_a_fault_at_all_sites_leaves_no_text_and_stops_the_run_which_can_go_on(
    make_experiment, tmp_path, monkeypatch, caplog
):
    experiment = make_experiment(*TINY, 'data.tasks=["surgery"]', "federation.rounds=1")

    def leak(*args):
        raise RuntimeError("patient 17 has gout")

    with monkeypatch.context() as patch:
        patch.setattr("client.requests.local_update", leak)
        with pytest.raises(UserError, match=r"quorum.*--resume"):
            simulated(experiment, tmp_path)
    assert not (tmp_path / "results.json").exists()
    log = (tmp_path / "metrics.jsonl").read_text()
    assert "client reports 'failed'" in log
    assert "gout" not in log
    assert "gout" in caplog.text  # the site's own log has it
    simulated(experiment, tmp_path, resume=True)
    assert read_results(tmp_path).average_accuracy is not None
