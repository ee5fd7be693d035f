"""The real thing in small: real model, real data, the real Flower apps, in one process."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MetricRecord,
)

from client.app import make_app
from deal_core.config.experiment import Experiment
from deal_core.config.run_config import to_run_config
from deal_core.errors import UserError
from deal_core.models import adapter_shapes
from server.checkpoint import load_checkpoint
from server.results import read_results
from server.run import run
from simulations.engines.inprocess import (
    InProcessGrid,
    Interceptor,
    run_inprocess,
)
from simulations.engines.worker_pool import assume_identity
from tests.simulations.runs import at, gain, learnt_adapter, same
from tests.sizes import ENOUGH_TO_LEARN, TINY

pytestmark = pytest.mark.usefixtures("one_model")


def with_faults(experiment: Experiment, interceptor: Interceptor) -> list[dict]:
    """Run with every reply passing through ``interceptor``; return the events."""
    events: list[dict] = []
    grid = InProcessGrid(make_app(), to_run_config(experiment), experiment.federation.clients)
    grid.interceptor = interceptor
    with assume_identity(1, 1):
        run(grid, experiment, events.append)
    return events


def matrix(folder: Path) -> list[list[float]]:
    return read_results(folder).accuracy_matrix


def is_update(reply: Message) -> bool:
    return reply.has_content() and "lora" in reply.content.array_records


@pytest.fixture(scope="module")
def finished(make_experiment, tmp_path_factory, one_model):
    folder = tmp_path_factory.mktemp("finished")
    experiment = at(make_experiment(*TINY), folder)
    events: list[dict] = []
    run_inprocess(experiment, events.append)
    return experiment, folder, events


def test_a_run_learns(make_experiment, tmp_path):
    run_inprocess(at(make_experiment(*ENOUGH_TO_LEARN), tmp_path), lambda event: None)
    assert gain(read_results(tmp_path)) > 0


def test_a_run_leaves_valid_results(finished):
    experiment, folder, events = finished
    results = read_results(folder)
    assert results.config == experiment
    assert results.tasks == ["laboratory", "surgery"]
    assert np.array(results.accuracy_matrix).shape == (2, 2)
    assert [e["event"] for e in events].count("round_finished") == 4
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert logged == events


def test_labels_and_zero_shot_accuracy_of_each_client_are_in_the_results(finished):
    _, folder, _ = finished
    results = read_results(folder)
    assert {task: len(set(labels)) for task, labels in results.labels.items()} == {
        task: len(labels) for task, labels in results.labels.items()
    }
    assert min(map(len, results.labels.values())) > 1
    for j, task in enumerate(results.tasks):
        own = [(c.zero_shot[j], c.test_examples[j]) for c in results.per_client.values()]
        right = sum(share * tests for share, tests in own if share is not None)
        assert right / sum(tests for _, tests in own) == pytest.approx(results.zero_shot[task])


def test_among_all_labels_seen_so_far_nobody_is_right_more_often(finished):
    results = read_results(finished[1])
    among_all = results.class_incremental
    own, every = np.array(results.accuracy_matrix), np.array(among_all.accuracy_matrix)
    assert every.shape == own.shape
    assert (every <= own).all()
    assert every[0, 0] == own[0, 0]  # task 1 alone is learnt: there are no other labels
    assert (every < own).any()
    assert among_all.zero_shot == results.zero_shot
    assert among_all.per_client.keys() == results.per_client.keys()


def test_the_update_of_two_clients_is_their_weighted_mean(finished, tmp_path):
    """Catch what the clients send in the first round, average it by hand."""
    experiment, _, _ = finished
    sent: list[tuple[float, dict[str, np.ndarray]]] = []
    first = experiment.model_copy(
        update={"federation": experiment.federation.model_copy(update={"rounds": 1})}
    )

    def catch(reply: Message) -> Message:
        if is_update(reply) and reply.content["status"]["stage"] == 0:
            weight = float(reply.content["metrics"]["num_examples"])
            arrays = {k: a.numpy() for k, a in reply.content["lora"].items()}
            sent.append((weight, arrays))
        return reply

    kept: dict[str, object] = {}

    def stop_after_round(reply: Message) -> Message:
        if "correct" in reply.content.metric_records.get("metrics", {}) and sent:
            path = tmp_path / "checkpoint.safetensors"
            shapes = adapter_shapes(experiment.model, experiment.adapter)
            kept.setdefault("state", load_checkpoint(path, shapes).state)
        return catch(reply)

    with_faults(at(first, tmp_path), stop_after_round)
    assert len(sent) == 2
    total = sum(weight for weight, _ in sent)
    key = next(iter(sent[0][1]))
    mean = sum(weight / total * arrays[key] for weight, arrays in sent)
    layer = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    got = kept["state"].current.layers[layer].A.numpy()
    np.testing.assert_allclose(got, mean, rtol=0, atol=1e-6)


def test_nothing_but_adapters_and_figures_leaves_a_client(finished, tmp_path):
    """Every field of every reply, by name and type."""
    experiment, _, _ = finished
    seen: set[str] = set()

    def look(reply: Message) -> Message:
        for name, record in reply.content.items():
            for key, value in record.items():
                kind = "adapter" if isinstance(value, Array) else type(value).__name__
                where = f"{name}.{'*' if kind == 'adapter' else key}"
                seen.add(f"{where}: {kind}")
                if kind == "adapter":
                    assert key.endswith((".lora_A.weight", ".lora_B.weight"))
        return reply

    with_faults(at(experiment, tmp_path), look)
    assert seen == {
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


def test_equal_seeds_equal_matrix_and_adapter(finished, tmp_path):
    experiment, folder, _ = finished
    run_inprocess(at(experiment, tmp_path), lambda event: None)
    assert matrix(tmp_path) == matrix(folder)
    assert same(learnt_adapter(folder), learnt_adapter(tmp_path))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_stopped_anywhere_and_resumed_equals_uninterrupted(finished, tmp_path, steps):
    """Interrupt in the middle of a step; the checkpoint before it stands, 3 of them at the border
    of two tasks. Within the second task: test_every_method."""
    experiment, folder, _ = finished
    ended = {"round_finished", "stage_finished"}
    count = 0

    def interrupt(event: dict) -> None:
        nonlocal count
        count += event["event"] in ended
        if count == steps and event["event"] in {"client_finished", "round_finished"}:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_inprocess(at(experiment, tmp_path), interrupt)
    assert not (tmp_path / "results.json").exists()
    run_inprocess(at(experiment, tmp_path, resume=True), lambda event: None)
    assert matrix(tmp_path) == matrix(folder)
    assert same(learnt_adapter(folder), learnt_adapter(tmp_path))


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
    experiment, folder, _ = finished
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
    run_inprocess(at(experiment, tmp_path, resume=True), lambda event: None)
    assert matrix(tmp_path) == matrix(folder)


def spoil(kind: str, reply: Message) -> Message | None:
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
]


@pytest.mark.parametrize("kinds", [KINDS, ["silent"]], ids=["spoilt", "silent"])
def test_a_bad_reply_costs_its_sender_the_round_and_nobody_else(make_experiment, tmp_path, kinds):
    """Another kind of reply in every round, always by the first who answers."""
    experiment = make_experiment(
        *TINY,
        'data.tasks=["surgery"]',
        f"federation.rounds={len(kinds)}",
        f"federation.deadline_seconds={3 if kinds == ['silent'] else 20}",
    )
    hit: set[int] = set()

    def bad(reply: Message) -> Message | None:
        if (
            is_update(reply)
            and (server_round := reply.content["status"]["server_round"]) not in hit
        ):
            hit.add(server_round)
            return spoil(kinds[server_round - 1], reply)
        return reply

    events = with_faults(at(experiment, tmp_path), bad)
    failed = [e for e in events if e["event"] == "client_failed"]
    assert [e["server_round"] for e in failed] == list(range(1, len(kinds) + 1))
    assert all(e["reason"] for e in failed)
    assert [e["clients"] for e in events if e["event"] == "round_finished"] == [1] * len(kinds)
    assert all(np.isfinite(value).all() for value in learnt_adapter(tmp_path).values())


def test_below_quorum_the_run_stops_and_resumes(make_experiment, tmp_path):
    experiment = make_experiment(
        'data.tasks=["surgery"]', "data.max_train=16", "data.max_test=16", "federation.rounds=1"
    )

    def all_bad(reply: Message) -> Message | None:
        return spoil("nan", reply) if is_update(reply) else reply

    with pytest.raises(UserError, match="quorum") as stop:
        with_faults(at(experiment, tmp_path), all_bad)
    assert "--resume" in str(stop.value)
    assert not (tmp_path / "results.json").exists()
    run_inprocess(at(experiment, tmp_path, resume=True), lambda event: None)
    assert read_results(tmp_path).average_accuracy > 0


def test_a_fault_at_a_site_leaves_no_text(make_experiment, tmp_path, monkeypatch, caplog):
    experiment = make_experiment('data.tasks=["surgery"]', "federation.rounds=1")

    def leak(*args: object) -> None:
        raise RuntimeError("patient 17 has gout")

    monkeypatch.setattr("client.requests.local_update", leak)
    with pytest.raises(UserError, match="quorum"):
        run_inprocess(at(experiment, tmp_path), lambda event: None)
    log = (tmp_path / "metrics.jsonl").read_text()
    assert "client reports 'failed'" in log
    assert "gout" not in log
    assert "gout" in caplog.text  # the site's own log has it


def test_sampling_takes_some_clients_and_is_seeded(make_experiment, tmp_path):
    experiment = make_experiment(
        "data.max_train=40",
        "data.max_test=16",
        "federation.clients=4",
        "federation.clients_per_round=2",
        "federation.rounds=3",
        'data.tasks=["surgery"]',
        'data.partition.kind="iid"',
    )
    rounds = []
    for name in ("one", "two"):
        events: list[dict] = []
        run_inprocess(at(experiment, tmp_path / name), events.append)
        chosen = [e["client"] for e in events if e["event"] == "client_finished"]
        rounds.append(chosen)
        assert len(chosen) == 6
    assert rounds[0] == rounds[1]
    assert len(set(rounds[0])) > 2


def test_the_exported_adapter_gives_the_global_model_in_plain_peft(finished):
    """W0 + retained + current, loaded by a tool that knows nothing of this project."""
    from peft import PeftModel
    from transformers import AutoModel

    from deal_core.data.embedded import asset_folder
    from deal_core.lora.adapter import stack

    experiment, folder, _ = finished
    shapes = adapter_shapes(experiment.model, experiment.adapter)
    state = load_checkpoint(folder / "checkpoint.safetensors", shapes).state
    whole = stack(state.parts())
    base = AutoModel.from_pretrained(str(asset_folder("minilm")))
    plain = PeftModel.from_pretrained(base, str(folder / "adapter"))
    for name in shapes:
        delta = plain.base_model.model.get_submodule(name).get_delta_weight("default")
        f = whole.layers[name]
        torch.testing.assert_close(delta, f.B @ f.A, rtol=0, atol=1e-5)
        assert delta.abs().max() > 0


def test_a_causal_model_counts_among_the_labels_of_a_task_alone(
    make_experiment, make_causal, tmp_path
):
    """All labels would cost it a pass each: nothing else is sent, and nothing is claimed."""
    folder = make_causal(tmp_path / "model", "llama")
    experiment = make_experiment(
        "model.family=causal-lm",
        f'model.name="{folder}"',
        "federation.rounds=1",
        "data.max_train=8",
        "data.max_test=8",
    )
    run_inprocess(at(experiment, tmp_path / "run"), lambda event: None)
    results = read_results(tmp_path / "run")
    assert results.class_incremental is None
    assert np.array(results.accuracy_matrix).shape == (2, 2)
