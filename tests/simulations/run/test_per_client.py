"""Clients with tasks and orders of their own, through the real apps."""

from functools import partial

import numpy as np
import pytest

from client import local_training as work
from client.app import make_app
from deal_core.config.file import to_run_config
from deal_core.data import open_source
from deal_core.data.partition import partition
from deal_core.deal.interface import LocalTask
from deal_core.methods import METHODS
from deal_core.wire.instruction import read_instruction
from server.results import read_results
from server.run import run
from simulations.engines.inprocess import FIRST_CLIENT_NODE, InProcessGrid
from simulations.engines.worker_pool import assume_identity
from tests.simulations.runs import (
    assert_same_run,
    learnt_adapter,
    run_in_process,
    simulated,
    stopped,
)
from tests.sizes import QUIET, TINY
from tests.slow import slow_but

pytestmark = pytest.mark.usefixtures("one_model")

ORDERS = (
    'stream.orders={0=["laboratory", "surgery", "medicine"], 1=["surgery"], '
    '2=["medicine", "laboratory"]}'
)


def per_client(make_experiment, folder, *overrides):
    """Three clients, a round a task; a stage of two rounds and one of one."""
    return make_experiment(
        f'run.out="{folder}"',
        'data.tasks=["laboratory", "surgery", "medicine"]',
        *TINY,
        "federation.clients=3",
        "federation.rounds=1",
        "stream.schedule=per-client",
        "stream.consolidate_every=2",
        ORDERS,
        *overrides,
    )


@pytest.fixture
def own_orders(make_experiment, tmp_path):
    return partial(per_client, make_experiment, tmp_path)


L, S, M = "laboratory", "surgery", "medicine"
PLANNED = {
    (0, 1): {"0": (L, (), ()), "1": (S, (), ()), "2": (M, (), ())},
    (0, 2): {"0": (S, (), (L,)), "2": (L, (), (M,))},  # 1 is through; nothing is retained yet
    (1, 1): {"0": (M, (L, S), (L, S))},
}
"""Of each client its task, what it knows others had met, and its own past."""


class Spy(InProcessGrid):
    """Notes what is asked of whom."""

    def push_messages(self, messages):
        messages = list(messages)
        self.asked = getattr(self, "asked", [])
        for message in messages:
            if "instruction" in message.content.config_records:
                instruction = read_instruction(dict(message.content["instruction"]))
                client = str(message.metadata.dst_node_id - FIRST_CLIENT_NODE)
                self.asked.append((client, message.metadata.message_type, instruction))
        return super().push_messages(messages)


def test_every_client_learns_its_own_task_on_its_own_data(own_orders, tmp_path, monkeypatch):
    experiment = own_orders("method.name=replay")
    learnt = []

    def spied(**fields):
        learnt.append(LocalTask(**fields))
        return learnt[-1]

    monkeypatch.setattr(work.interface, "LocalTask", spied)
    grid = Spy(make_app(), to_run_config(experiment), 3)
    events = []
    with assume_identity(1, 1):
        run(grid, experiment, events.append)

    found = {}
    for client, kind, asked in grid.asked:
        if kind == "train":
            place = found.setdefault((asked.stage, asked.server_round), {})
            place[client] = asked.task, asked.seen, asked.past
    assert found == PLANNED

    data = {name: open_source(experiment.data).load(name) for name in (L, S, M)}
    shares = {n: partition(d, experiment.data.partition, 3, 0) for n, d in data.items()}
    finished = [event for event in events if event["event"] == "client_finished"]
    work_done = [(c, *what) for place in PLANNED.values() for c, what in place.items()]
    for (client, task, seen, past), event, local in zip(work_done, finished, learnt, strict=True):
        assert (event["client"], event["task"]) == (client, task)
        assert event["num_examples"] == len(shares[task][int(client)].train)
        assert tuple(local.labels) == data[task].labels
        assert local.seen == tuple(tuple(data[name].labels) for name in seen)
        assert not local.future()  # somebody works on each before the first stage has ended
        own = local.past.shares if local.past else []
        assert [tuple(share().labels) for share in own] == [data[name].labels for name in past]
        if own:  # the model at the start of the stage knows all of them, or none yet
            assert local.past.known == (2 if seen else 0)
        counts = [len(shares[name][int(client)].train) for name in past]
        assert [len(share().data) for share in own] == counts

    evaluations = [(c, a.tasks) for c, kind, a in grid.asked if kind == "evaluate"]
    assert evaluations == [(client, (L, S, M)) for _ in range(3) for client in "012"]
    results = read_results(tmp_path)
    assert [(stage.rounds, stage.work) for stage in results.stages] == [
        (2, {L: ["0", "2"], S: ["0", "1"], M: ["2"]}),
        (1, {M: ["0"]}),
    ]
    assert np.array(results.accuracy_matrix).shape == (2, 3)
    assert all(len(own.accuracy_matrix) == 2 for own in results.per_client.values())


def tiny(name):
    # Several steps a round: ewc holds nothing at the first, where it stands at the start.
    overrides = [f"method.name={name}", "federation.local_epochs=2"]
    if name == "deal":
        overrides.append('wire.dtype="int8"')  # what is lost outlives a change of task
    return overrides


@pytest.fixture(scope="module")
def whole_run(make_experiment, tmp_path_factory):
    """One run a method."""
    finished = {}

    def run_of(name):
        if name not in finished:
            folder = finished[name] = tmp_path_factory.mktemp(name)
            simulated(per_client(make_experiment, folder, *tiny(name)), folder)
        return finished[name]

    return run_of


EVERYBODY = (
    'stream.orders={0=["laboratory", "surgery"], 1=["surgery", "laboratory"], '
    '2=["laboratory", "surgery"]}'
)
RETURNING = (
    'stream.orders={0=["laboratory", "surgery", "laboratory"], 1=["surgery", "laboratory"], '
    '2=["surgery", "laboratory"]}'
)
EACH = "stream.consolidate_every=1"
CASES = [
    ("prototype", (EACH,)),
    ("deal", ("federation.rounds=2", "stream.consolidate_every=3")),
    ("deal", ("stream.joins={1=1}", EACH)),
    ("deal", (RETURNING, EACH)),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_class_means_are_those_of_all_tasks_at_once_whatever_the_orders(
    make_experiment, tmp_path, monkeypatch, case
):
    """A task is summed once, when the last of its clients has worked on it, whenever one joins, and
    also where a task returns; however many end in a stage."""
    method, settings = case
    monkeypatch.setattr("server.strategy.found_worse", lambda *given: False)
    asked = (*TINY, *QUIET, 'data.tasks=["laboratory", "surgery"]', "data.partition.kind=iid")
    asked += (f"method.name={method}", "method.prototype.enabled=on")
    events = []
    own = per_client(make_experiment, tmp_path / "own", *asked, EVERYBODY, *settings)
    simulated(own, tmp_path / "own", events.append)
    joint = make_experiment(
        *(*asked, "federation.clients=3"),
        *("stream.schedule=joint", "federation.rounds=1"),
    )
    simulated(joint, tmp_path / "joint")
    heads, expected = learnt_adapter(tmp_path / "own"), learnt_adapter(tmp_path / "joint")
    for task in ("laboratory", "surgery"):
        np.testing.assert_allclose(heads[task], expected[task], rtol=1e-4, atol=1e-4)
    assert not [event for event in events if event["event"] in ("sums_left_out", "round_lost")]


@pytest.mark.slow
def test_a_task_of_two_clients_has_no_class_means_and_the_run_goes_on(own_orders, tmp_path):
    """Of the sum over two, each knows the other's part, also where a third is in the round."""
    events = []
    simulated(own_orders(*tiny("prototype"), *QUIET), tmp_path, events.append)
    left_out = [event["task"] for event in events if event["event"] == "sums_left_out"]
    assert {L, S} <= set(left_out)
    assert events[-1]["event"] == "run_finished"
    assert not (tmp_path / "adapter" / "heads.safetensors").exists()


@pytest.mark.parametrize("name", slow_but(["deal", "ewc"], "deal"))
def test_stopped_within_a_stage_and_resumed_equals_a_whole_run(
    own_orders, whole_run, tmp_path, name
):
    """And equal seeds give equal runs; these two keep something at the client."""
    place = None

    def within(event):
        nonlocal place
        if event["event"] == "round_started":
            place = event["stage"], event["server_round"]
        return event["event"] == "client_finished" and place == (0, 2)

    stopped(own_orders(*tiny(name)), tmp_path, within)
    simulated(own_orders(*tiny(name)), tmp_path, resume=True)
    assert_same_run(tmp_path, whole_run(name))


@pytest.mark.parametrize(
    "method", slow_but(sorted(METHODS.keys() - {"linear-probe", "prototype"}), "deal")
)
def test_a_task_that_returns_and_a_client_that_joins_late_are_learnt_by_every_method(
    own_orders, tmp_path, method
):
    """The run is as long as the last client needs; a late client idles until it joins. A probe
    needs all clients of a task in one stage, and is refused; sums of fewer than three are left
    out."""
    orders = f'stream.orders={{0=["{L}", "{S}", "{L}"], 1=["{S}"], 2=["{M}"]}}'
    every = "stream.consolidate_every=1"
    experiment = own_orders(*tiny(method), orders, "stream.joins={2=2}", every)
    events = run_in_process(experiment)
    finished = [e for e in events if e["event"] == "client_finished"]
    worked = [(e["stage"], e["client"], e["task"]) for e in finished]
    expected = [(0, "0", L), (0, "1", S), (1, "0", S), (2, "0", L), (2, "2", M)]
    trained = [e for e in finished if e["phase"] == "learn"]
    assert sorted(worked) == expected
    assert len(trained) == len(expected)
    results = read_results(tmp_path)
    assert [list(stage.work) for stage in results.stages] == [[L, S], [S], [L, M]]
    assert len(results.accuracy_matrix) == 3
    model = learnt_adapter(tmp_path)
    if method == "prototype":
        assert all(model[task].any() for task in (L, S, M))
    else:
        assert all(value.any() for value in model.values())
