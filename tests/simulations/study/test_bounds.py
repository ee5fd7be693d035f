"""The bounds: which runs they are, and how a client learns jointly."""

from collections import Counter
from dataclasses import replace

import pytest

from client.gate import authorize
from client.identity import Client, ClientRequest
from client.local_training import local_update
from client.runtime import ClientRuntime
from deal_core.errors import UserError
from deal_core.methods import make_method
from deal_core.randomness import seeded
from deal_core.wire.instruction import Instruction
from server.plan import make_plan
from server.strategy import start_state
from simulations.study.outcome import BOUNDS

TASKS = ("laboratory", "surgery")
ALL_AT_ONCE = Instruction(
    task=TASKS[0], stage=0, server_round=1, tasks=TASKS, rank=8, retained_rank=16
)


def test_joint_is_one_stage_with_the_rounds_of_one_task(make_experiment):
    (part,) = BOUNDS["joint"].parts(make_experiment("federation.rounds=2"), TASKS).values()
    assert make_plan(part, TASKS, ("0", "1")).stages == [2]


def update_of(runtime, number, folder):
    """What a client makes of the first request."""
    method = make_method(runtime.experiment.method, runtime.experiment.adapter)
    begun = method.begin_task(start_state(runtime.experiment, runtime.shapes), seeded(0))
    client, phase = Client(number, folder, runtime.experiment), runtime.phases[ALL_AT_ONCE.phase]
    request = ClientRequest(client, runtime, ALL_AT_ONCE, phase, begun)
    return local_update(request, authorize(request.asked(), lambda: runtime.mechanism))


@pytest.mark.parametrize("schedule", ["joint", "joint-all-labels"])
def test_jointly_a_client_sees_each_of_its_examples_once_an_epoch(
    make_experiment, tmp_path, monkeypatch, schedule
):
    """Among the labels of its task, or of all tasks."""
    runtime = ClientRuntime(
        make_experiment(
            f"stream.schedule={schedule}",
            "method.name=sequential",
            "federation.local_epochs=2",
            "train.batch_size=8",
        )
    )
    seen = Counter()
    real = type(runtime.model).forward_train

    def learn(model, batch, labels, earlier):
        seen.update((each.tokens, labels[each.target], tuple(labels)) for each in batch)
        return real(model, batch, labels, earlier)

    monkeypatch.setattr(type(runtime.model), "forward_train", learn)
    shares = [runtime.task(task, 1) for task in TASKS]
    update = update_of(runtime, 1, tmp_path)
    everything = tuple(label for share in shares for label in share.labels)
    all_labels = schedule == "joint-all-labels"
    own = Counter(
        (each.tokens, share.labels[each.target], everything if all_labels else share.labels)
        for share in shares
        for each in share.train
    )
    assert seen == Counter({pair: count * 2 for pair, count in own.items()})
    assert update.figures["num_examples"] == sum(own.values()) > 0


def test_without_data_of_the_first_task_a_client_still_learns_the_others(make_experiment, tmp_path):
    def without_the_first(shares):
        first, *others = shares
        return [replace(first, train=()) if first.name == TASKS[0] else first, *others]

    config = make_experiment("stream.schedule=joint", "method.name=sequential")
    runtime = ClientRuntime(config, prepare=without_the_first)
    first, second = (runtime.task(task, 0) for task in TASKS)
    assert not first.train
    update = update_of(runtime, 0, tmp_path)
    assert update.figures["num_examples"] == len(second.train)


def test_participants_must_be_clients(make_experiment):
    with pytest.raises(UserError, match=r"participants names client 2, but the clients are 0 to 1"):
        make_experiment("federation.participants=[0, 2]")


def test_bounds_of_clients_with_their_own_orders(make_experiment):
    """Alone, nobody is compared with others; each task alone is of a stream that all share."""
    orders = ("stream.schedule=per-client", 'stream.orders={0=["surgery"], 1=["laboratory"]}')
    experiment = make_experiment(*orders, "aggregation.robust=cosine-norm")
    alone = BOUNDS["local-only"].parts(experiment, TASKS)
    assert {part.aggregation.robust for part in alone.values()} == {"none"}
    for stream in (orders, ("stream.joins={1=1}",)):
        with pytest.raises(UserError, match=r'"per-task": needs the stream of all clients'):
            BOUNDS["per-task"].parts(make_experiment(*stream), TASKS)
    seldom = make_experiment("stream.evaluate_every=3")
    assert BOUNDS["per-task"].parts(seldom, TASKS).keys() == set(TASKS)
