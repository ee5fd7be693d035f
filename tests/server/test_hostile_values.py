"""Replies in good order whose numbers are hostile: no crash, no damage, no unfair move."""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import Message, RecordDict

from client.requests import counts_reply
from deal_core.aggregation.rules import AGGREGATION_RULES, ROBUST_RULES
from deal_core.config.experiment import Experiment
from deal_core.config.file import to_run_config
from deal_core.errors import UserError
from deal_core.lora.adapter import Adapter, LoraFactors
from deal_core.lora.payload import WORSE, PayloadError
from deal_core.models import adapter_shapes
from deal_core.randomness import seeded
from server.folder import RunFolder
from server.run import Checkpoint, load_checkpoint, run
from server.wire import read_verdict, sendable
from simulations.engines.inprocess import InProcessGrid
from simulations.engines.worker_pool import assume_identity
from tests.server.fuzz_grid import FuzzGrid, lost, tiny_app, tiny_model
from tests.server.spoil import Mutation, alternating, every_float, figures, one_value, times

HASTE = 1e4
"""Silence lasts until the deadline."""
pytestmark = pytest.mark.usefixtures("now", "one_thread")
CLIENTS = 6
LARGEST = 3.4e38
REFUSED = {
    "a million times": times(1e6),
    "3e38": every_float(3e38),
    "largest, alternating": alternating(LARGEST),
    "one of 3e38": one_value(3e38),
    "1e20": every_float(-1e20),
    "forty": alternating(40.0),
    "half an example": figures(num_examples=0.5),
}
ACCEPTED = {
    "1e-45": every_float(1e-45),
    "alternating": alternating(0.2),
    "twice": times(2.0),
    "vast weight": figures(num_examples=10_000_000),
}
Spoil = Callable[[int, str], Mutation | None]
"""From round and client to what becomes of its update."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def experiment(folder, model, **tables):
    base = {
        "model": {"name": str(model)},
        "adapter": {
            "rank": 3,
            "retained_rank": 4,
            "target_modules": ("query", "intermediate.dense"),
        },
        "data": {"tasks": ("laboratory",)},
        "method": {"prototype": {"enabled": "off"}},  # rounds that train
        "federation": {"clients": CLIENTS, "rounds": 2, "quorum": 0.05},
        "run": {"out": str(folder)},
    }
    merged = {key: {**base.get(key, {}), **tables.get(key, {})} for key in base | tables}
    return Experiment.model_validate(merged)


@dataclass(frozen=True)
class Done:
    """A run to its end: what went out, what was logged, what is on the disk."""

    models: list[list[bytes]]
    events: list[dict[str, Any]]
    checkpoint: Checkpoint

    def of(self, kind):
        return [event for event in self.events if event["event"] == kind]


def played(config, spoil, weigh=lambda number: 10 + number):
    shapes = adapter_shapes(config.model, config.adapter)
    app = tiny_app(config, shapes, weigh)
    inner = InProcessGrid(app, to_run_config(config), config.federation.clients)
    folder = RunFolder(Path(config.run.out))

    def tamper(client, reply):
        if "lora" not in reply.content:
            return [reply]
        number = int(reply.content["status"]["server_round"])
        mutation = spoil(number, client)
        if mutation is None:
            return [reply]
        if mutation is lost:
            return lost(reply)
        mutation(reply, seeded("hostile", number, client))
        return [reply]

    grid = FuzzGrid(inner, shapes, folder, tamper)
    with assume_identity(1, 1):
        run(grid, config)
    events = [json.loads(line) for line in folder.metrics.read_text("utf-8").splitlines()]
    checkpoint = load_checkpoint(folder.checkpoint, shapes)
    sendable(checkpoint.state)
    return Done(grid.models, events, checkpoint)


def in_turn(kinds):
    """In every round one client sends the next kind."""
    order = list(kinds.values())
    return lambda number, client: order[number - 1] if int(client) == number % CLIENTS else None


def failing(kinds):
    """The same clients fail instead."""
    who = in_turn(kinds)
    return lambda number, client: lost if who(number, client) else None


def pair(rule, robust):
    """A mean by itself, and a robust step with a mean and with a stack, are fast tests."""
    fast = rule == "fedit" or (rule, robust) == ("flora", "cosine-norm")
    return pytest.param(rule, robust, marks=[] if fast else pytest.mark.slow)


PAIRS = [
    pair(rule, robust) for rule in sorted(AGGREGATION_RULES) for robust in sorted(ROBUST_RULES)
]


@pytest.mark.parametrize(("rule", "robust"), PAIRS)
def test_what_is_refused_leaves_the_model_that_there_is_without_its_sender(
    tmp_path, model, rule, robust
):
    tables = {
        "aggregation": {"rule": rule, "robust": robust},
        "federation": {"rounds": len(REFUSED)},
    }
    hostile = played(experiment(tmp_path / "a", model, **tables), in_turn(REFUSED))
    without = played(experiment(tmp_path / "b", model, **tables), failing(REFUSED))
    assert hostile.models == without.models
    assert len(set(map(str, hostile.models))) > len(REFUSED)
    failed = [(e["server_round"], e["client"]) for e in hostile.of("client_failed")]
    assert failed == [(n, str(n % CLIENTS)) for n in range(1, len(REFUSED) + 1)]
    assert {e["clients"] for e in hostile.of("round_finished")} == {CLIENTS - 1}
    assert not hostile.of("round_lost")
    assert all(0 < len(e["reason"]) < 500 for e in hostile.of("client_failed"))


@pytest.mark.parametrize(("rule", "robust"), PAIRS)
def test_what_is_let_in_ends_no_run_and_damages_no_checkpoint(tmp_path, model, rule, robust):
    tables = {
        "aggregation": {"rule": rule, "robust": robust},
        "federation": {"rounds": len(ACCEPTED)},
    }
    done = played(experiment(tmp_path, model, **tables), in_turn(ACCEPTED))
    assert not done.of("client_failed")
    assert not done.of("round_lost")
    assert [e["client"] for e in done.of("weight_cut")] == [str(len(ACCEPTED) % CLIENTS)]
    assert done.of("weight_cut")[0]["weight"] == 50.0 * 12.0  # times the median of the others


@pytest.mark.parametrize("clients", [1, 2])
@pytest.mark.parametrize("kind", ["a million times", "3e38", "largest, alternating", "one of 3e38"])
def test_one_or_two_clients_have_a_bound_too(tmp_path, model, clients, kind):
    """The only one that is left fails: the round ends below its quorum, and nothing is written."""
    federation = {"clients": clients, "rounds": 1}
    config = experiment(tmp_path, model, federation=federation)

    def spoil(number, client):
        return REFUSED[kind] if client == "0" else None

    if clients == 1:
        with pytest.raises(UserError, match="0 of 1 clients gave a valid reply"):
            played(config, spoil)
        shapes = adapter_shapes(config.model, config.adapter)
        sendable(load_checkpoint(RunFolder(tmp_path).checkpoint, shapes).state)
        return
    done = played(config, spoil)
    assert [e["client"] for e in done.of("client_failed")] == ["0"]
    assert [e["clients"] for e in done.of("round_finished")] == [1]


@pytest.mark.parametrize("weight", [2.0, 1e7, 1.5])
def test_under_a_mechanism_every_client_weighs_one(tmp_path, model, weight):
    config = experiment(
        tmp_path,
        model,
        privacy={"mechanism": "record", "noise": "seeded"},
        federation={"clients_per_round": 0},
    )

    def spoil(number, client):
        return figures(num_examples=weight) if client == "3" else None

    done = played(config, spoil, weigh=lambda number: 1.0)
    assert [e["client"] for e in done.of("client_failed")] == ["3", "3"]
    assert all("num_examples is not 1" in e["reason"] for e in done.of("client_failed"))
    assert [e["clients"] for e in done.of("round_finished")] == [CLIENTS - 1] * 2


def raises(aggregate):
    torch.linalg.svd(torch.full((3, 3), torch.nan))
    return aggregate


def with_entry(value):
    def spoilt(aggregate):
        layers = {
            n: LoraFactors(f.A, torch.full_like(f.B, value))
            for n, f in aggregate.current.layers.items()
        }
        return replace(aggregate, current=Adapter(layers, aggregate.current.scaling))

    return spoilt


ENDS = {
    "linear algebra": raises,
    "division": lambda aggregate: replace(aggregate, error=aggregate.error / 0),
    "NaN": with_entry(torch.nan),
    "inf": with_entry(torch.inf),
    "infinite error": lambda aggregate: replace(aggregate, error=torch.inf),
    "residual": lambda aggregate: replace(
        aggregate, residual=with_entry(torch.nan)(aggregate).current
    ),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_round_whose_numbers_fail_is_lost_and_the_run_goes_on(tmp_path, model, monkeypatch, end):
    """FedIT, whose second round ends badly."""
    fedit, rounds = AGGREGATION_RULES["fedit"], itertools.count(1)

    def begin(before):
        inner = fedit.begin(before)
        spoil = ENDS[end] if next(rounds) == 2 else lambda aggregate: aggregate
        return SimpleNamespace(add=inner.add, finish=lambda: spoil(inner.finish()))

    monkeypatch.setitem(AGGREGATION_RULES, "fedit", replace(fedit, begin=begin))
    config = experiment(tmp_path, model, federation={"rounds": 3})
    done = played(config, lambda number, client: None)
    (event,) = done.of("round_lost")
    assert event["server_round"] == 2
    assert event["reason"]
    assert done.models[4] == done.models[3] != done.models[5]
    assert [error is None for error in done.checkpoint.history.aggregation_error] == [
        *(False, True, False)
    ]


@pytest.mark.parametrize("what", ["begin_task", "end_task"])
def test_a_step_between_rounds_that_fails_leaves_the_model_as_it_was(
    tmp_path, model, monkeypatch, what
):
    from deal_core.deal.method import Deal

    good = getattr(Deal, what)
    calls = []

    def failing(self, *arguments):
        calls.append(what)
        if len(calls) == 2:
            torch.linalg.svd(torch.full((3, 3), torch.nan))
        return good(self, *arguments)

    monkeypatch.setattr(Deal, what, failing)
    config = experiment(
        tmp_path, model, data={"tasks": ("laboratory", "surgery")}, federation={"rounds": 1}
    )
    done = played(config, lambda number, client: None)
    (event,) = done.of("step_lost")
    assert event["stage"] == 1
    assert "LinAlgError" in event["reason"]
    assert done.of("run_finished")


@pytest.mark.parametrize(
    ("told", "read"), [(0, False), (1, True), (2, None), (-1, None), (0.5, None)]
)
def test_a_verdict_is_one_bit(told, read):
    with assume_identity(1, 1):
        asked = Message(RecordDict(), dst_node_id=1, message_type="evaluate")
        reply = counts_reply(asked, {WORSE: told})
    if read is None:
        with pytest.raises(PayloadError, match="no bit"):
            read_verdict(reply)
    else:
        assert read_verdict(reply) is read
