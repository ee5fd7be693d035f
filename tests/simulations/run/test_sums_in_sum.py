"""Sums over records leave in a secure sum alone, as they are and with noise."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord

from deal_core.config.experiment import Experiment
from deal_core.data import Example, open_source
from deal_core.deal import class_means as prototypes
from deal_core.models import adapter_shapes
from deal_core.privacy.distributed_noise import COUNT_WEIGHT
from deal_core.privacy.ledger import Ledger
from deal_core.protection import common_noise_multiplier
from deal_core.training.evaluation import base_embeddings
from server.run import load_latest
from simulations.engines.inprocess import FIRST_CLIENT_NODE
from tests.conftest import load_once
from tests.simulations.runs import LoseOneUpdate, at, public_texts, run_in_process
from tests.sizes import QUIET
from tests.slow import slow_but

pytestmark = pytest.mark.usefixtures("one_model")

FEW = ("data.max_train=12", "data.max_test=4")
PLAIN = (*FEW, "federation.clients=3", "federation.rounds=1")
SECURE = (*PLAIN, "aggregation.secure=true")
PROTOTYPE = ("method.name=prototype",)
NOISED = (
    *SECURE,
    *PROTOTYPE,
    "method.prototype.layers=1",
    "method.prototype.directions=0",
    "train.step=server",
    "privacy.target_delta=1e-3",
)
PRIVATE = (*NOISED, "privacy.mechanism=record", "privacy.noise_share=sum")


def played(experiment, folder, see=lambda reply: reply):
    """Events, and the last checkpoint."""
    folder.mkdir(exist_ok=True)
    events = run_in_process(at(experiment, folder), see)
    shapes = adapter_shapes(experiment.model, experiment.adapter)
    return events, load_latest(folder / "checkpoint.safetensors", shapes)[0]


def heads_alike(one, two):
    first, second = one.state.heads, two.state.heads
    return first.keys() == second.keys() and all(torch.equal(first[t], second[t]) for t in first)


@pytest.mark.parametrize("secure", slow_but(["false", "true"], "false"))
@pytest.mark.parametrize("method", slow_but(["prototype", "deal", "linear-probe"], "prototype"))
def test_in_a_phase_of_statistics_nothing_leaves_but_masked_vectors(
    make_experiment, tmp_path, method, secure
):
    """Whatever the experiment says of updates; with noise and public directions as by default."""
    left = set()

    def see(reply):
        records = reply.content
        phase = records["status"].get("phase", "") if "status" in records else ""
        for name, record in records.items():
            left.update((phase, f"{name}.{key}") for key in record)
        return reply

    asked = (
        f"method.name={method}",
        "method.prototype.enabled=on",
        f"aggregation.secure={secure}",
        public_texts(tmp_path),
        "method.prototype.directions=4",
    )
    events, _ = played(make_experiment(*PLAIN, *asked), tmp_path / "run", see)
    ended = {(e["phase"], e["stage"]) for e in events if e["event"] == "summed"}
    phases = {"prototype": ["learn"], "deal": ["prototypes"], "linear-probe": ["learn", "probe"]}
    assert {(phase, stage) for phase in phases[method] for stage in (0, 1)} <= ended
    for phase in phases[method]:
        fields = {name for of, name in left if of == phase}
        assert "secure.reply" in fields
        assert not {name.partition(".")[0] for name in fields} - {"status", "secure", "metrics"}
        assert not {"metrics.loss", "metrics.seconds"} & fields
    if method != "deal":
        assert not {name for _, name in left if name.startswith(("lora", "sums"))}


FOUR = ("data.max_test=4", "federation.clients=4", "federation.rounds=1", "federation.quorum=0.5")


def unmasked(name):
    """Sums beside the masked vector, in a record that once held them, or in that of an update."""

    def change(reply):
        reply.content[name] = ArrayRecord({"0.count": Array(np.ones(4))})

    return change


def in_its_place(reply):
    unmasked("sums")(reply)
    del reply.content["secure"]


def of_another_length(reply):
    masked = reply.content["secure"]["reply"]
    assert isinstance(masked, bytes)
    reply.content["secure"] = ConfigRecord({"reply": masked[:-8]})


def of_another_phase(reply):
    reply.content["status"]["phase"] = "probe"


HOSTILE = {
    "sums beside it": unmasked("sums"),
    "an update beside it": unmasked("lora"),
    "sums in its place": in_its_place,
    "another length": of_another_length,
    "another phase": of_another_phase,
}


def to_the_third(change):
    """Change the third client's masked vectors; None: they are lost."""

    def see(reply):
        third = reply.metadata.src_node_id == FIRST_CLIENT_NODE + 2
        if not third or not reply.has_content() or "metrics" not in reply.content:
            return reply
        if "secure" not in reply.content:
            return reply
        if change is None:
            return None
        change(reply)
        return reply

    return see


@pytest.fixture(scope="module")
def of_the_others(make_experiment, tmp_path_factory):
    """What the server makes of the sums of the others."""
    folder, quick = tmp_path_factory.mktemp("others"), ("federation.deadline_seconds=0.2",)
    experiment = make_experiment(*FOUR, *PROTOTYPE, *QUIET, *quick)
    return played(experiment, folder, to_the_third(None))[1]


@pytest.mark.parametrize("kind", slow_but(HOSTILE, "sums beside it"))
def test_a_reply_that_is_not_a_masked_vector_alone_costs_its_sender_the_sum(
    make_experiment, tmp_path, of_the_others, kind
):
    experiment = make_experiment(*FOUR, *PROTOTYPE, *QUIET)
    events, end = played(experiment, tmp_path / "run", to_the_third(HOSTILE[kind]))
    failed = [event for event in events if event["event"] == "client_failed"]
    assert {event["client"] for event in failed} == {"2"}
    assert all(0 < len(event["reason"]) < 500 for event in failed)
    assert [event["sites"] for event in events if event["event"] == "summed"] == [3, 3]
    assert heads_alike(end, of_the_others)


@dataclass
class Private:
    """A run in which noise protects records, what left in arrays, and what the server made of it:
    sums of each task, and the deviation of their noise."""

    experiment: Experiment
    folder: Path
    left: set[str] = field(default_factory=set)
    events: list[dict[str, Any]] = field(default_factory=list)
    sums: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    deviations: list[float] = field(default_factory=list)
    heads: dict[str, torch.Tensor] = field(default_factory=dict)


@pytest.fixture(scope="module")
def private(make_experiment, tmp_path_factory):
    ran = Private(make_experiment(*PRIVATE), tmp_path_factory.mktemp("private"))
    absorb = prototypes.absorb

    def watched(state, totals, known, projected):
        ran.sums |= totals
        ran.deviations.append(known.deviation)
        return absorb(state, totals, known, projected)

    def see(reply):
        ran.left.update(reply.content.array_records)
        return reply

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prototypes, "absorb", watched)
        ran.events, end = played(ran.experiment, ran.folder, see)
    ran.heads = dict(end.state.heads)
    return ran


def test_class_sums_are_charged_once_a_task_before_they_leave(private):
    experiment = private.experiment
    assert private.left == set()
    multiplier = common_noise_multiplier(experiment, 2)
    for client in "012":
        held = Ledger(private.folder / "sites" / client).events()
        assert [(e.task, e.steps, e.sample_rate) for e in held] == [
            (task, 1, 1.0) for task in experiment.data.tasks
        ]
        assert {e.noise_multiplier for e in held} == {multiplier}
    assert not [event for event in private.events if event["event"] == "round_lost"]


def embedded(experiment, task):
    """Vectors of all records of a task, their labels, and vectors of the labels' names."""
    model = load_once()(experiment.model, experiment.adapter, experiment.train.max_length)
    data = open_source(experiment.data).load(task)
    names = [Example(label, data.labels[0]) for label in data.labels]
    records, named = (model.encode(own, data.labels) for own in (data.train, names))
    x, vectors = (base_embeddings(model, own, 1).double() for own in (records, named))
    return x, torch.tensor([each.target for each in records]), vectors


def test_what_the_server_sees_is_the_sum_of_all_records_with_the_noise_that_it_counts_on(private):
    shares = private.experiment.federation.clients - private.experiment.privacy.colluding
    deviation = common_noise_multiplier(private.experiment, 2) * math.sqrt(3 / shares)
    assert private.deviations == pytest.approx([deviation] * 2)
    noise = []
    for task, found in private.sums.items():
        x, y, names = embedded(private.experiment, task)
        clipped = torch.zeros(len(names), x.shape[1]).double().index_add_(0, y, x)
        noise.append((found["sum"] - clipped / math.sqrt(1 + COUNT_WEIGHT**2)).flatten())
    whole = torch.cat(noise)
    assert float(whole.std()) == pytest.approx(deviation, rel=0.05)
    assert abs(float(whole.mean())) < 4 * deviation / math.sqrt(len(whole))


def test_heads_come_from_names_and_class_sums(private, make_experiment, tmp_path):
    """Without noise they are those of class means; with it, names count beside them."""
    exact = make_experiment(*NOISED, QUIET[1], 'train.precision="float32"')
    quiet = played(exact, tmp_path / "quiet")[1].state.heads
    deviation = private.deviations[0]
    for task, found in private.sums.items():
        x, y, names = embedded(private.experiment, task)
        means = torch.stack([x[y == label].mean(0) for label in range(len(names))])
        directions = torch.nn.functional.normalize(means, dim=1)
        length = prototypes.SCALE * math.sqrt(x.shape[1])
        prior = prototypes.LABEL_NAME_PRIOR * deviation**2 / max(1.0, float(found["count"].mean()))
        rows = quiet[task].double() / length
        torch.testing.assert_close(rows[:, :-1], directions, rtol=0, atol=1e-4)
        records = found["count"].clamp(min=1.0)[:, None]
        mixed = (found["sum"] + prior * names) / (records + prior)
        known = (found["count"] + prior > 0)[:, None]  # else noise has left nothing of it
        mixed = torch.nn.functional.normalize(torch.where(known, mixed, names), dim=1)
        rows = private.heads[task].double() / length
        torch.testing.assert_close(rows[:, :-1], mixed, rtol=0, atol=1e-6)
        assert float((mixed - directions).norm()) > 0.1


def test_sums_of_a_task_are_masked_once_even_after_a_round_that_is_lost(make_experiment, tmp_path):
    """Two sums over other sites, of the same class sums, would tell the difference."""
    lose = LoseOneUpdate()
    asked = (
        "federation.rounds=2",
        "federation.quorum=0.1",
        "federation.deadline_seconds=0.2",
        'data.tasks=["laboratory"]',
    )
    experiment = make_experiment(*SECURE, *PROTOTYPE, *QUIET, *asked)
    events, end = played(experiment, tmp_path / "run", lose)
    assert lose.lost
    assert not [event for event in events if event["event"] == "summed"]
    assert {e["code"] for e in events if e["event"] == "client_idle"} == {"masked"}
    assert end.state.heads == {}
