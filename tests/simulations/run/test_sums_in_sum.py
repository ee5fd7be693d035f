"""Sums of embeddings that leave in a secure sum alone, as they are and with noise."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from flwr.app import Message
from scipy.optimize import brentq
from scipy.stats import norm

from deal_core.data import open_source
from deal_core.errors import UserError
from deal_core.models import adapter_shapes, label_vectors
from deal_core.privacy.accounting.common_noise import common_noise_multiplier
from deal_core.privacy.accounting.ledger import Ledger
from deal_core.privacy.mechanisms.registry import make_mechanism
from server.checkpoint import Checkpoint, load_latest
from server.results import read_results
from simulations.run.preflight import check_names
from tests.simulations.runs import at, run_in_process
from tests.slow import slow_but

pytestmark = pytest.mark.usefixtures("one_model")

SECURE = ("federation.clients=3", "federation.rounds=1", "aggregation.secure=true")
PLAIN = (*SECURE[:2], "aggregation.secure=false")
PROTOTYPE = ("method.name=prototype",)
NOISED = (
    *SECURE,
    *PROTOTYPE,
    "method.prototype.covariance=none",
    "method.prototype.layers=1",
    "train.step=server",
    "privacy.target_delta=1e-3",
)
PRIVATE = (*NOISED, "privacy.mechanism=record", "privacy.noise_share=sum")


def last(folder: Path, experiment) -> Checkpoint:
    shapes = adapter_shapes(experiment.model, experiment.adapter)
    return load_latest(folder / "checkpoint.safetensors", shapes)[0]


def played(experiment, folder: Path, see=lambda reply: reply):
    folder.mkdir(exist_ok=True)
    events = run_in_process(at(experiment, folder), see)
    return events, last(folder, experiment)


@pytest.mark.parametrize("method", slow_but(["prototype", "deal", "linear-probe"], "prototype"))
def test_a_secure_run_has_the_heads_of_a_plain_one(make_experiment, tmp_path, method):
    """Sums are the same to the ring's rounding; of deal, the adapter is too."""
    asked = (
        f"method.name={method}",
        "method.prototype.enabled=on",
        "method.linear_probe.rounds=2",
        "train.precision=float32",
    )
    left: set[str] = set()

    def see(reply: Message) -> Message:
        left.update(reply.content.array_records)
        return reply

    _, plain = played(make_experiment(*PLAIN, *asked), tmp_path / "plain")
    events, secure = played(make_experiment(*SECURE, *asked), tmp_path / "secure", see)
    assert left == set()
    assert not [event for event in events if event["event"] == "round_lost"]
    assert plain.state.heads.keys() == secure.state.heads.keys() != set()
    for task, head in plain.state.heads.items():
        off = (secure.state.heads[task] - head).norm() / head.norm()  # in the clear: float32
        assert float(off) < 1e-4
    assert {t: set(own) for t, own in secure.history.collected.items()} == {
        t: set(own) for t, own in plain.history.collected.items()
    }
    first, second = (read_results(tmp_path / name) for name in ("plain", "secure"))
    assert first.average_accuracy == pytest.approx(second.average_accuracy, abs=0.02)


@pytest.fixture(scope="module")
def private(make_experiment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("private")
    experiment = make_experiment(*PRIVATE)
    left: set[str] = set()

    def see(reply: Message) -> Message:
        left.update(reply.content.array_records)
        return reply

    return experiment, folder, *played(experiment, folder, see), left


def test_class_sums_are_charged_once_a_task_before_they_leave(private):
    experiment, folder, events, _, left = private
    assert left == set()
    multiplier = common_noise_multiplier(experiment, 2)
    for client in "012":
        held = Ledger(folder / "sites" / client).events()
        assert [(e.task, e.steps, e.sample_rate) for e in held] == [
            (task, 1, 1.0) for task in experiment.data.tasks
        ]
        assert {e.noise_multiplier for e in held} == {multiplier}
    assert not [event for event in events if event["event"] == "round_lost"]


def test_epsilon_is_that_of_an_independent_accountant(private):
    """Two Gaussian mechanisms are one of less noise, by the root of two (Balle & Wang 2018)."""
    experiment, folder, _, _, _ = private
    multiplier = common_noise_multiplier(experiment, 2) / math.sqrt(2)

    def delta(epsilon: float) -> float:
        first = norm.cdf(1 / (2 * multiplier) - epsilon * multiplier)
        return first - math.exp(epsilon) * norm.cdf(-1 / (2 * multiplier) - epsilon * multiplier)

    expected = brentq(lambda epsilon: delta(epsilon) - 1e-3, 1e-6, 50.0)
    told = read_results(folder).privacy.epsilon
    assert set(told) == {str(k) for k in range(experiment.federation.clients)}
    assert list(told.values()) == pytest.approx([expected] * len(told), rel=0.01)


def test_heads_come_from_names_and_class_sums(private, make_experiment, tmp_path):
    """With little noise they are those of class means; with much, those of names."""
    quiet = played(make_experiment(*NOISED), tmp_path / "quiet")[1].state.heads
    plain = make_experiment(*PLAIN, *PROTOTYPE, *NOISED[4:6])
    sums = played(plain, tmp_path / "plain")[1].state.sums
    for task in quiet:
        rows = torch.nn.functional.normalize(sums[f"sum/{task}"], dim=1).float()
        torch.testing.assert_close(quiet[task][:, :-1], rows, rtol=0, atol=2e-3)
    noised, vectors = private[3].state.heads, label_vectors(private[0].model)
    for task, head in noised.items():
        angle = (head[:, :-1] * quiet[task][:, :-1]).sum(1)
        assert bool((angle < 0.999).all())
        names = vectors(open_source(private[0].data).load(task).labels)
        assert bool(((head[:, :-1] * names).sum(1) > 0.3).all())
        assert torch.allclose(head[:, :-1].norm(dim=1), torch.ones(len(head)), atol=1e-5)


def test_sums_of_a_task_are_masked_once_even_after_a_round_that_is_lost(make_experiment, tmp_path):
    """Two sums over other sites, of the same class sums, would tell the difference."""
    lost: list[Message] = []

    def lose_the_first(reply: Message) -> Message | None:
        if lost or not {"secure", "metrics"} <= set(reply.content):
            return reply
        lost.append(reply)
        return None

    asked = (
        "federation.rounds=2",
        "federation.quorum=0.1",
        "federation.deadline_seconds=1",
        'data.tasks=["laboratory"]',
    )
    experiment = make_experiment(*SECURE, *PROTOTYPE, *asked)
    events, end = played(experiment, tmp_path / "run", lose_the_first)
    assert lost
    assert not [event for event in events if event["event"] == "summed"]
    assert {e["code"] for e in events if e["event"] == "client_idle"} == {"masked"}
    assert end.state.heads == {}


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("federation.rounds=2", "set federation.rounds to 1"),
        ("method.prototype.covariance=shared", "leave without noise"),
        ("method.prototype.layers=4", "leave without noise"),
        ("method.name=linear-probe", "leave without noise"),
        ("privacy.mechanism=client", "leave without noise"),
        ("aggregation.secure=false", "set aggregation.secure to true"),
    ],
)
def test_what_noise_would_not_protect_is_refused(make_experiment, override, line):
    with pytest.raises(UserError, match=line):
        make_mechanism(make_experiment(*PRIVATE, override))


def test_who_has_no_record_of_a_task_gives_sums_of_the_others(make_experiment, tmp_path):
    for task, hospitals in (("itch", ("north", "south")), ("pain", ("north",))):
        (tmp_path / "data" / task).mkdir(parents=True)
        rows = [
            {"text": f"{task} {h} {n}", "label": f"{task} {n % 2}", "hospital": h}
            for h in ("north", "south")
            for n in range(6)
        ]
        train = [row for row in rows if row["hospital"] in hospitals]
        for name, kept in (("train", train), ("test", rows)):
            lines = "\n".join(json.dumps(row) for row in kept)
            (tmp_path / "data" / task / f"{name}.jsonl").write_text(lines)
    experiment = make_experiment(
        *("data.source=files", f'data.path="{tmp_path / "data"}"', 'data.tasks=["itch", "pain"]'),
        *("federation.clients=2", "federation.rounds=1", "stream.schedule=joint"),
        'data.partition={kind="column", column="hospital"}',
        "method.name=prototype",
    )
    events = run_in_process(at(experiment, tmp_path / "run"))
    assert not [event for event in events if event["event"] == "client_failed"]
    assert read_results(tmp_path / "run").average_accuracy > 0.5


def test_sums_of_several_tasks_at_a_time_are_refused(make_experiment):
    with pytest.raises(UserError, match="clients work on others at a time"):
        check_names(make_experiment(*SECURE, *PROTOTYPE, "stream.schedule=per-client"))
