"""Who works on which task in which round, and which step comes when: pure, so that a resumed run
finds the plan it left.

Every client has an order of tasks and works ``rounds`` rounds on each; one that has not joined yet,
or is through, idles. All clients consolidate together, every ``every`` rounds; what lies between
two consolidations is a stage. Where all clients have the same order and a stage is as long as a
task, stages and tasks are the same thing: that is the synchronous schedule. All tasks at once are
one stage, with the rounds of one task.

The clock is the federation's: a round in which a client is not sampled, or its reply is lost,
counts as one of its rounds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Literal

import torch

from deal_core.config.experiment import Experiment
from deal_core.deal.interface import Phase
from deal_core.errors import UserError, choose
from deal_core.randomness import seeded
from deal_core.wire.instruction import LEARN

Order = tuple[str, ...]
"""Tasks, in the order in which a client works on them."""
PAUSE = ""
"""In an order: the client idles for the rounds of a task, in which others work."""


@dataclass(frozen=True)
class Plan:
    """Who works on what in which round.

    Attributes:
        tasks: all, in the stream's order.
        orders: client name to its tasks; one may return.
        rounds: per task.
        every: rounds of learning per stage; the last stage may have fewer. Rounds of further phases
            come after them, with the clients and tasks of the last one.
        joint_tasks: every task is worked on in every round.
        trainers: clients that train; orders of the others only keep the clock. Empty: all train.
        joins: client name to the rounds of the run that are over when its order begins; none: 0.
        evaluate_every: stages from one evaluation on all tasks to the next.
    """

    tasks: Order
    orders: Mapping[str, Order]
    rounds: int
    every: int
    joint_tasks: bool = False
    trainers: frozenset[str] = frozenset()
    joins: Mapping[str, int] = field(default_factory=dict)
    evaluate_every: int = 1

    @cached_property
    def stages(self) -> list[int]:
        """Rounds of each stage: the client that is through last decides how many there are."""
        ends = [
            self.joins.get(name, 0) + self.rounds * len(own) for name, own in self.orders.items()
        ]
        total = self.rounds if self.joint_tasks else max(ends)
        return [min(self.every, total - start) for start in range(0, total, self.every)]

    @cached_property
    def _rounds(self) -> list[dict[str, str]]:
        rounds: list[dict[str, str]] = [{} for _ in range(sum(self.stages))]
        for name, order in self._trained.items():
            turns = (task for task in order for _ in range(self.rounds))
            for at_work, task in zip(rounds[self.joins.get(name, 0) :], turns, strict=False):
                if task != PAUSE:
                    at_work[name] = task
        return rounds

    @cached_property
    def _trained(self) -> dict[str, Order]:
        some = self.trainers or self.orders.keys()
        return {name: order for name, order in self.orders.items() if name in some}

    @cached_property
    def learners(self) -> frozenset[str]:
        """Clients that train in some round of the run."""
        return frozenset(name for name, order in self._trained.items() if order)

    def _over(self, stage: int, server_round: int) -> int:
        """Rounds of learning before one; those of further phases count as their stage's last."""
        return stage * self.every + min(server_round, self.stages[stage]) - 1

    def working(self, stage: int, server_round: int) -> dict[str, str]:
        """Return client to task in a round (from 1 in every stage), of those that train in it."""
        return self._rounds[self._over(stage, server_round)]

    def at_work(self, stage: int, server_round: int) -> dict[str, list[str]]:
        """Return each task that is worked on in a round to its clients: all tasks to all that work,
        where tasks are learnt at once."""
        working = self.working(stage, server_round)
        tasks = self.tasks if self.joint_tasks else dict.fromkeys(working.values())
        return {
            task: [name for name, own in working.items() if self.joint_tasks or own == task]
            for task in tasks
        }

    def past(self, client: str, stage: int, server_round: int) -> Order:
        """Return the tasks that the client worked on before its turn in a round, by when it first
        met them. A task that returns is among them: it was worked on before."""
        over = self._over(stage, server_round) - self.joins.get(client, 0)
        return _tasks_in(self.orders[client][: max(0, over // self.rounds)])

    def met(self, stage: int, server_round: int = 1) -> Order:
        """Return what the teacher of a round knows, in the stream's order: tasks that some client
        worked on before the stage, or, in the rounds of further phases, until its learning
        ended."""
        ended = stage + (server_round > self.stages[stage])
        met = {task for at_work in self._rounds[: ended * self.every] for task in at_work.values()}
        return tuple(task for task in self.tasks if task in met)

    def learnt(self, stage: int) -> Order:
        """Return what some client has worked on when a stage has ended, in the stream's order;
        before the first (-1) nothing."""
        if stage < 0:
            return ()
        return self.tasks if self.joint_tasks else self.met(stage, self.stages[stage] + 1)

    def future(self, stage: int) -> Order:
        """What no client works on until the stage has ended, in the stream's order."""
        return tuple(task for task in self.tasks if task not in self.learnt(stage))

    def ended(self, stage: int) -> dict[str, list[str]]:
        """Return each task that all of its clients have worked on when a stage ends, and not when
        the one before did, in the stream's order, to these clients."""
        own = {
            task: [name for name, order in self._trained.items() if task in order]
            for task in self.tasks
        }
        return {
            task: clients
            for task, clients in own.items()
            if clients and max(self._through(name, task) for name in clients) == stage
        }

    def worked(self, client: str, stage: int) -> Order:
        """Return the tasks that a client has worked on when a stage ends."""
        own = _tasks_in(self.orders[client])
        return tuple(task for task in own if self._through(client, task) <= stage)

    def _through(self, client: str, task: str) -> int:
        """The stage in which a client has worked on a task for the first time."""
        if self.joint_tasks:
            return 0
        turns = self.orders[client].index(task) + 1
        over = self.joins.get(client, 0) + self.rounds * turns
        return min(math.ceil(over / self.every), len(self.stages)) - 1

    def evaluated(self, stage: int) -> Order:
        """Return the tasks that are evaluated when a stage has ended, in the stream's order: all
        (as before the first, -1), or those whose turn it was, or is next, whoever trains."""
        last = len(self.stages) - 1
        if stage in (-1, last) or (stage + 1) % self.evaluate_every == 0:
            return self.tasks
        whoever = replace(self, trainers=frozenset())
        near = {*whoever.work(stage), *whoever.work(stage + 1)}
        return tuple(task for task in self.tasks if task in near) or self.tasks

    def work(self, stage: int) -> dict[str, list[str]]:
        """Task, in the stream's order, to the clients that train on it in some round of a stage."""
        start = stage * self.every
        pairs = {each for work in self._rounds[start : start + self.every] for each in work.items()}
        clients = {
            task: [
                name
                for name, order in self._trained.items()
                if (name, task) in pairs or (self.joint_tasks and task in order)
            ]
            for task in self.tasks
        }
        return {task: names for task, names in clients.items() if names}


def make_plan(experiment: Experiment, tasks: Sequence[str], clients: Sequence[str]) -> Plan:
    """Return the plan that ``stream.schedule`` asks for; equal seeds give equal plans.

    Args:
        experiment: of the run.
        tasks: of the stream, in its order.
        clients: names.

    Raises:
        UserError: ``stream.orders`` or ``stream.joins`` names what is not there, no client meets
            some task, or a client joins when there is nothing left to do.
    """
    stream, rounds = experiment.stream, experiment.federation.rounds
    for name in (*stream.orders, *stream.joins):
        if name not in clients:
            raise UserError(
                f"stream names client '{name}' (orders, joins); the clients are {clients[0]} to "
                f"{clients[-1]}"
            )
    for name, order in stream.orders.items():
        for task in order:
            choose(f"task in stream.orders.{name}:", task, dict.fromkeys(tasks))
    joins: dict[str, int] = dict(stream.joins)
    if stream.schedule == "per-client":
        orders = {}
        for name in clients:
            generator = seeded(experiment.run.seed, "order", name)
            drawn = torch.randperm(len(tasks), generator=generator).tolist()
            orders[name] = stream.orders.get(name, tuple(tasks[i] for i in drawn))
    else:
        begins = {name: math.ceil(joins.get(name, 0) / rounds) for name in clients}
        orders = {name: tuple(tasks[begins[name] :]) for name in clients}
        joins = {name: rounds * begins[name] for name in joins}
    missed = set(tasks).difference(*orders.values())
    if missed:
        raise UserError(
            f"stream: no client meets the task '{next(t for t in tasks if t in missed)}'; name it "
            "in stream.orders, or let a client join earlier (stream.joins)"
        )
    _check_joins(orders, joins, rounds)
    if experiment.method.retention.apart and stream.schedule == "per-client":
        idle = {name: (PAUSE,) * math.ceil(begins / rounds) for name, begins in joins.items()}
        orders = one_task_at_a_time({n: (*idle.get(n, ()), *own) for n, own in orders.items()})
        joins = {}
    trainers = frozenset(map(str, experiment.federation.participants))
    every, joint_tasks = stream.consolidate_every or rounds, stream.at_once
    often = stream.evaluate_every
    return Plan(tuple(tasks), orders, rounds, every, joint_tasks, trainers, joins, often)


def one_task_at_a_time(orders: Mapping[str, Order]) -> dict[str, Order]:
    """Return the same orders with pauses, so that all who work in a round work on one task: those
    of a turn one after another. A component is learnt by itself, and goes on where another client
    meets its task later (:mod:`deal_core.deal.routed`)."""
    spread: dict[str, list[str]] = {name: [] for name in orders}
    for turn in range(max(map(len, orders.values()))):
        own = {name: order[turn] for name, order in orders.items() if turn < len(order)}
        for task in _tasks_in(own.values()):
            for name, slots in spread.items():
                slots.append(task if own.get(name) == task else PAUSE)
    return {name: tuple(slots) for name, slots in spread.items()}


def _tasks_in(slots: Iterable[str]) -> Order:
    """Each task once, by when it first comes."""
    return tuple(task for task in dict.fromkeys(slots) if task != PAUSE)


def _check_joins(orders: Mapping[str, Order], joins: Mapping[str, int], rounds: int) -> None:
    """Check that who joins late has something to do, and that some client works in every round."""
    over = 0
    for name, order in sorted(orders.items(), key=lambda each: joins.get(each[0], 0)):
        begins = joins.get(name, 0)
        if name in joins and not order:
            raise UserError(
                f"stream.joins: client {name} has nothing left to do when it joins; let it join "
                "earlier, or leave it out"
            )
        if order and begins > over:
            raise UserError(
                f"stream.joins: client {name} joins after round {begins}, and nobody works in "
                f"rounds {over + 1} to {begins}; let it join after round {over} or before"
            )
        over = max(over, begins + rounds * len(order))


StepKind = Literal["zero-shot", "round", "end-stage"]


@dataclass(frozen=True)
class Step:
    """One step of a run; a checkpoint follows each.

    Attributes:
        kind: ``zero-shot`` (evaluate the start), ``round`` (one round of local updates),
            ``end-stage`` (end it and evaluate).
        stage: what lies between two consolidations, from 0; -1 for zero-shot.
        server_round: from 1 in every stage, over all phases; 0 where the step is no round.
        phase: of the method, to which the step belongs.
        round: rounds of the whole run up to the step, its own included.
    """

    kind: StepKind
    stage: int
    server_round: int = 0
    phase: str = LEARN
    round: int = 0


def schedule(rounds: Sequence[int], further: Sequence[Phase] = ()) -> list[Step]:
    """Return the steps of a run.

    What the model knew at the start is measured after the first round: learning begins at once.

    Args:
        rounds: of learning, for each stage; at least one.
        further: phases that every stage has after them.
    """
    steps: list[Step] = []
    for stage, count in enumerate(rounds):
        steps += [Step("round", stage, number) for number in range(1, count + 1)]
        done = count
        for phase in further:
            numbers = range(done + 1, done + phase.rounds + 1)
            steps += [Step("round", stage, number, phase.name) for number in numbers]
            done += phase.rounds
        steps.append(Step("end-stage", stage))
    steps.insert(1, Step("zero-shot", -1))
    counted = accumulate(step.kind == "round" for step in steps)
    return [replace(step, round=int(count)) for step, count in zip(steps, counted, strict=True)]
