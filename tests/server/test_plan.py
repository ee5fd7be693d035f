from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deal_core.config.data import StreamConfig
from deal_core.config.experiment import (
    Experiment,
    FederationConfig,
    MethodConfig,
    PrototypeConfig,
    RetentionConfig,
    RunConfig,
)
from deal_core.deal.interface import Phase, phases_after
from deal_core.errors import UserError
from deal_core.methods import method_of
from deal_core.protection import run_schedule
from server.plan import Plan, Step, make_plan, schedule

TASKS = ("a", "b", "c", "d")
CLIENTS = ("0", "1", "2")


APART = MethodConfig(retention=RetentionConfig(apart=True))


def planned(tasks=TASKS, clients=CLIENTS, rounds=2, seed=0, method=None, **stream):
    experiment = Experiment(
        method=method or MethodConfig(),
        stream=StreamConfig(**{"schedule": "per-client", **stream}),
        federation=FederationConfig(rounds=rounds),
        run=RunConfig(seed=seed),
    )
    return make_plan(experiment, tasks, clients)


@st.composite
def plans(draw):
    tasks = TASKS[: draw(st.integers(1, 4))]
    own = st.lists(st.sampled_from(tasks), max_size=6).map(tuple)
    orders = {str(n): draw(own) for n in range(draw(st.integers(0, 3)))} | {"all": tasks}
    joins = {name: draw(st.integers(0, 9)) for name in orders if draw(st.booleans())}
    rounds, every = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    return Plan(tasks, orders, rounds, every, joins=joins)


@given(plans())
def test_the_plan_is_what_each_client_does_round_after_round(plan):
    """Compared with clients that wait until they join, then work through their own lists, one round
    at a time; tasks return."""
    left = {
        name: [None] * plan.joins.get(name, 0)
        + [task for task in order for _ in range(plan.rounds)]
        for name, order in plan.orders.items()
    }
    done = {name: [] for name in plan.orders}
    own = {task: [n for n, order in plan.orders.items() if task in order] for task in plan.tasks}
    ended = set()
    assert set(plan.stages[:-1]) <= {plan.every}
    assert 0 < plan.stages[-1] <= plan.every
    for stage, rounds in enumerate(plan.stages):
        met = {task for tasks in done.values() for task in tasks}
        assert plan.met(stage) == tuple(task for task in plan.tasks if task in met)
        worked = {}
        for server_round in range(1, rounds + 1):
            begun = {name: tasks.pop(0) for name, tasks in left.items() if tasks}
            assert begun  # the run ends when the last is through
            now = {name: task for name, task in begun.items() if task is not None}
            assert plan.working(stage, server_round) == now
            for name, task in now.items():
                turns = len(done[name]) // plan.rounds
                earlier = dict.fromkeys(plan.orders[name][:turns])
                assert plan.past(name, stage, server_round) == tuple(earlier)
                worked.setdefault(task, set()).add(name)
                done[name].append(task)
        met = {task for tasks in done.values() for task in tasks}
        further = plan.met(stage, rounds + 1)
        assert further == tuple(task for task in plan.tasks if task in met)
        assert plan.future(stage) == tuple(task for task in plan.tasks if task not in met)
        assert {task: set(names) for task, names in plan.work(stage).items()} == worked
        assert list(plan.work(stage)) == [task for task in plan.tasks if task in worked]
        through = {
            task: names
            for task, names in own.items()
            if task not in ended and all(done[n].count(task) >= plan.rounds for n in names)
        }
        assert plan.ended(stage) == through
        assert list(plan.ended(stage)) == list(through)
        ended |= through.keys()
    assert not any(left.values())  # all rounds of all tasks were worked
    assert ended == set(plan.tasks)  # each once


@pytest.mark.parametrize("every", [0, 2])
def test_the_synchronous_schedule_is_the_plan_in_which_all_have_the_same_order(every):
    joint_tasks = planned(schedule="synchronous")
    assert joint_tasks == planned(orders=dict.fromkeys(CLIENTS, TASKS), consolidate_every=every)
    assert joint_tasks.stages == [2, 2, 2, 2]


def test_who_does_not_train_keeps_the_clock_and_teaches_nothing():
    orders = {"0": ("a",), "1": ("b", "c", "d"), "2": ()}
    experiment = Experiment(
        stream=StreamConfig(schedule="per-client", orders=orders),
        federation=FederationConfig(rounds=1, clients=3, participants=(0,)),
    )
    plan = make_plan(experiment, TASKS, CLIENTS)
    assert plan.stages == [1, 1, 1]
    assert [plan.working(stage, 1) for stage in range(3)] == [{"0": "a"}, {}, {}]
    assert [plan.met(stage) for stage in range(3)] == [(), ("a",), ("a",)]
    assert [plan.ended(stage) for stage in range(3)] == [{"a": ["0"]}, {}, {}]


def test_an_order_is_drawn_for_every_client_by_the_seed():
    plan = planned()
    assert plan == planned()
    assert plan.orders != planned(seed=1).orders
    assert all(sorted(order) == sorted(TASKS) for order in plan.orders.values())
    assert len(set(plan.orders.values())) > 1
    more = planned(clients=(*CLIENTS, "3"))
    assert {name: more.orders[name] for name in CLIENTS} == plan.orders


@given(st.integers(0, 30), st.integers(1, 3), st.integers(0, 4))
def test_components_are_learnt_one_task_at_a_time_each_client_in_its_own_order(seed, rounds, late):
    own = {"seed": seed, "rounds": rounds, "joins": {"2": late}}
    plan, free = planned(method=APART, **own), planned(**own)
    found = {name: [] for name in CLIENTS}
    for stage, number in enumerate(plan.stages):
        assert number == rounds
        (task,) = plan.work(stage)
        for name in plan.work(stage)[task]:
            assert plan.past(name, stage, 1) == tuple(found[name])
            found[name].append(task)
        for server_round in range(1, number + 1):
            assert set(plan.working(stage, server_round).values()) == {task}
    assert {name: tuple(tasks) for name, tasks in found.items()} == free.orders
    assert {t for stage in range(len(plan.stages)) for t in plan.ended(stage)} == set(TASKS)


@pytest.mark.parametrize(
    ("stream", "problem"),
    [
        ({"orders": {"0": ("a",), "1": ("b",), "2": ("d",)}}, "no client meets the task 'c'"),
        ({"orders": {"3": ("a",)}}, "names client '3' (orders, joins); the clients are 0 to 2"),
        ({"orders": {"1": ("a", "aa")}}, "unknown task in stream.orders.1: 'aa'; known: a, b, c"),
        ({"joins": {"1": 20}}, "nobody works in rounds 9 to 20; let it join after round 8"),
        ({"schedule": "synchronous", "joins": {"1": 7}}, "client 1 has nothing left to do"),
    ],
)
def test_a_plan_that_cannot_be_is_one_line(stream, problem):
    with pytest.raises(UserError) as error:
        planned(**stream)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


@given(st.integers(0, 6))
def test_a_late_client_begins_with_the_next_task_where_tasks_come_in_turn_for_all(over):
    plan = planned(schedule="synchronous", joins={"1": over})
    own = TASKS[-(-over // 2) :]
    assert plan.orders == {"0": TASKS, "1": own, "2": TASKS}
    assert plan.stages == [2, 2, 2, 2]
    for stage, task in enumerate(TASKS):
        there = CLIENTS if task in own else ("0", "2")
        for server_round in (1, 2):
            assert plan.working(stage, server_round) == dict.fromkeys(there, task)
        assert plan.work(stage) == {task: list(there)}
        assert plan.past("1", stage, 1) == tuple(t for t in TASKS[:stage] if t in own)
        assert plan.met(stage) == TASKS[:stage]


@given(
    st.lists(st.lists(st.sampled_from(TASKS), min_size=1, max_size=6), min_size=3, max_size=3),
    st.dictionaries(st.sampled_from(CLIENTS[1:]), st.integers(0, len(TASKS))),
    st.integers(1, 3),
    st.integers(0, 4),
)
@settings(deadline=None)
def test_nobody_is_asked_for_more_than_the_privacy_budget_was_planned_for(
    drawn, joins, rounds, every
):
    """Whatever returns and whoever joins when; the plan of a budget is made of the settings."""
    orders = dict(zip(CLIENTS, map(tuple, drawn), strict=True)) | {"0": (*drawn[0], *TASKS)}
    stream = StreamConfig(
        schedule="per-client", orders=orders, joins=joins, consolidate_every=every
    )
    experiment = Experiment(
        stream=stream,
        federation=FederationConfig(rounds=rounds, clients=len(CLIENTS)),
        method=MethodConfig(prototype=PrototypeConfig(enabled="off")),
    )
    plan, method = make_plan(experiment, TASKS, CLIENTS), method_of(experiment)
    asked = Counter()
    for step in schedule(plan.stages, phases_after(method)):
        if step.kind == "round":
            asked.update(plan.working(step.stage, step.server_round).items())
    work = run_schedule(experiment, dict.fromkeys(TASKS, 9)).work
    planned_rounds = {each.task: each.rounds for each in work}
    assert all(count <= planned_rounds[task] for (_, task), count in asked.items())
    assert max(asked.values()) == max(planned_rounds.values())


def test_every_stage_has_its_rounds_of_all_phases_then_its_end():
    polish = Phase("polish", 1, lambda *given: None)
    assert schedule([2, 1], [polish]) == [
        Step("round", 0, 1, round=1),
        Step("zero-shot", -1, round=1),  # of the start; learning does not wait for it
        Step("round", 0, 2, round=2),
        Step("round", 0, 3, "polish", round=3),
        Step("end-stage", 0, round=3),
        Step("round", 1, 1, round=4),  # counted over the whole run
        Step("round", 1, 2, "polish", round=5),
        Step("end-stage", 1, round=5),
    ]


def test_an_evaluation_between_those_on_all_tasks_asks_for_what_measures_need():
    plan = planned(schedule="synchronous", evaluate_every=3)
    asked = [plan.evaluated(stage) for stage in range(-1, 4)]
    assert asked == [TASKS, ("a", "b"), ("b", "c"), TASKS, TASKS]
    own = planned(orders={"0": ("c", "a"), "1": ("b",), "2": ("d", "a")}, evaluate_every=9)
    assert [own.evaluated(stage) for stage in range(-1, 2)] == [TASKS, TASKS, TASKS]
    assert {planned().evaluated(stage) for stage in range(-1, 4)} == {TASKS}
    for one in CLIENTS:  # each part of a bound asks for the same
        part = replace(plan, trainers=frozenset(one))
        assert [part.evaluated(stage) for stage in range(-1, 4)] == asked
