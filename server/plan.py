"""Who works on which task in which round, and which step comes when: pure, so that a resumed run
finds the plan it left.

Every client has an order of tasks and works ``rounds`` rounds on each; one that has not joined yet,
or is through, idles. All clients consolidate together, every ``every`` rounds; what lies between
two consolidations is a stage. Where all clients have the same order and a stage is as long as a
task, stages and tasks are the same thing: that is the synchronous schedule. All tasks at once are
one stage, with the rounds of one task.

The clock is the federation's: a round in which a client is not sampled, or its reply is lost,
counts as one of its rounds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Literal

import torch

from deal_core.config.data import StreamConfig
from deal_core.config.experiment import Experiment
from deal_core.errors import UserError, choose
from deal_core.methods import Phase
from deal_core.randomness import seeded
from deal_core.wire.instruction import LEARN

Order = tuple[str, ...]
"""Tasks, in the order in which a client works on them."""


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    Attributes:
        tasks: all, in the stream's order.
        orders: client name to its tasks; one may return.
        rounds: per task.
        every: rounds of learning per stage; the last stage may have fewer. Rounds of further phases
            come after them, with the clients and tasks of the last one.
        joint_tasks: every task is worked on in every round.
        trainers: clients that train, whatever their order says of the others; empty: all.
        joins: client name to the rounds of the run that are over when its order begins; none: 0.
    """

    tasks: Order
    orders: Mapping[str, Order]
    rounds: int
    every: int
    joint_tasks: bool = False
    trainers: frozenset[str] = frozenset()
    joins: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def stages(self) -> list[int]:
        """Rounds of each stage: the client that is through last decides how many there are."""
        total = self.rounds if self.joint_tasks else max(map(self._end, self.orders))
        return [min(self.every, total - start) for start in range(0, total, self.every)]

    def working(self, stage: int, server_round: int) -> dict[str, str]:
        """Return client to task in a round (from 1 in every stage); who idles, or does not train,
        is not in it."""
        at_work = {}
        for name, order in self._trained.items():
            turn = self._turn(name, stage, server_round)
            if 0 <= turn < len(order):
                at_work[name] = order[turn]
        return at_work

    def at_work(self, stage: int, server_round: int) -> dict[str, list[str]]:
        """Return each task that is worked on in a round to its clients: all tasks to all that work,
        where tasks are learnt at once."""
        working = self.working(stage, server_round)
        if self.joint_tasks:
            return {task: list(working) for task in self.tasks}
        found: dict[str, list[str]] = {}
        for client, task in working.items():
            found.setdefault(task, []).append(client)
        return found

    def past(self, client: str, stage: int, server_round: int) -> Order:
        """Return the tasks that the client worked on before its turn in a round, by when it first
        met them. A task that returns is among them: it was worked on before."""
        turn = max(0, self._turn(client, stage, server_round))
        return tuple(dict.fromkeys(self.orders[client][:turn]))

    def met(self, stage: int, server_round: int = 1) -> Order:
        """Return what the teacher of a round knows, in the stream's order: tasks that some client
        worked on before the stage, or, in the rounds of further phases, until its learning
        ended."""
        ended = stage + (server_round > self.stages[stage])
        met: set[str] = set()
        for name, order in self._trained.items():
            worked = max(0, ended * self.every - self.joins.get(name, 0))
            met.update(order[: -(-worked // self.rounds)])
        return tuple(task for task in self.tasks if task in met)

    def future(self, stage: int) -> Order:
        """What no client works on until the stage has ended, in the stream's order."""
        known = self.tasks if self.joint_tasks else self.met(stage, self.stages[stage] + 1)
        return tuple(task for task in self.tasks if task not in known)

    def learnt(self, stage: int) -> Order:
        """Return what some client has worked on when a stage has ended, in the stream's order;
        nothing before the first (-1)."""
        future = self.tasks if stage < 0 else self.future(stage)
        return tuple(task for task in self.tasks if task not in future)

    def ended(self, stage: int) -> dict[str, list[str]]:
        """Return each task that all of its clients have worked on when a stage ends, and not when
        the one before did, in the stream's order, to these clients."""
        found = {}
        for task in self.tasks:
            clients = [name for name, order in self._trained.items() if task in order]
            ends = [self._through(name, task) for name in clients]
            if clients and max(ends) == stage:
                found[task] = clients
        return found

    def worked(self, client: str, stage: int) -> Order:
        """Return the tasks that a client has worked on when a stage ends."""
        own = dict.fromkeys(self.orders[client])
        return tuple(task for task in own if self._through(client, task) <= stage)

    def _through(self, client: str, task: str) -> int:
        """Return the stage in which a client has worked on a task for the first time."""
        if self.joint_tasks:
            return 0
        turns = self.orders[client].index(task) + 1
        over = self.joins.get(client, 0) + self.rounds * turns
        return min(-(-over // self.every), len(self.stages)) - 1

    def work(self, stage: int) -> dict[str, list[str]]:
        """Task, in the stream's order, to the clients that train on it in some round of a stage."""
        clients: dict[str, list[str]] = {task: [] for task in self.tasks}
        for name, order in self._trained.items():
            first = max(0, self._turn(name, stage, 1))
            after = max(0, self._turn(name, stage, self.stages[stage]) + 1)
            for task in order if self.joint_tasks else dict.fromkeys(order[first:after]):
                clients[task].append(name)
        return {task: names for task, names in clients.items() if names}

    @property
    def learners(self) -> frozenset[str]:
        """Clients that train in some round of the run."""
        return frozenset(name for name, order in self._trained.items() if order)

    @property
    def _trained(self) -> Mapping[str, Order]:
        """The orders of those that train."""
        if not self.trainers:
            return self.orders
        return {name: order for name, order in self.orders.items() if name in self.trainers}

    def _end(self, client: str) -> int:
        """Rounds of the run that are over when the client is through."""
        return self.joins.get(client, 0) + self.rounds * len(self.orders[client])

    def _turn(self, client: str, stage: int, server_round: int) -> int:
        """Position in the client's order; negative before it joins."""
        learning = min(server_round, self.stages[stage])
        over = stage * self.every + learning - 1
        return (over - self.joins.get(client, 0)) // self.rounds


def make_plan(experiment: Experiment, tasks: Sequence[str], clients: Sequence[str]) -> Plan:
    """Return the plan that ``stream.schedule`` asks for.

    Args:
        experiment: equal seeds give equal plans.
        tasks: of the stream, in its order.
        clients: names.

    Raises:
        UserError: ``stream.orders`` or ``stream.joins`` names what is not there, no client meets
            some task, or a client joins when there is nothing left to do.
    """
    stream, rounds = experiment.stream, experiment.federation.rounds
    for name in (*stream.orders, *stream.joins):
        _check_client(name, clients)
    for name, order in stream.orders.items():
        for task in order:
            choose(f"task in stream.orders.{name}:", task, dict.fromkeys(tasks))
    joint_tasks = stream.at_once
    joins: dict[str, int] = dict(stream.joins)
    if stream.schedule == "per-client":
        seed = experiment.run.seed
        orders = {name: _order(stream, name, tasks, seed) for name in clients}
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
    every = stream.consolidate_every or rounds
    trainers = frozenset(map(str, experiment.federation.participants))
    return Plan(tuple(tasks), orders, rounds, every, joint_tasks, trainers, joins)


def _order(stream: StreamConfig, client: str, tasks: Sequence[str], seed: int) -> Order:
    """What the experiment says, or all tasks in an order that is drawn."""
    if client in stream.orders:
        return stream.orders[client]
    drawn = torch.randperm(len(tasks), generator=seeded(seed, "order", client)).tolist()
    return tuple(tasks[i] for i in drawn)


def _check_joins(orders: Mapping[str, Order], joins: Mapping[str, int], rounds: int) -> None:
    """Check that who joins late has something to do, and that nobody waits for it."""
    for name in joins:
        if not orders[name]:
            raise UserError(
                f"stream.joins: client {name} has nothing left to do when it joins; let it join "
                "earlier, or leave it out"
            )
    over = 0
    for name, order in sorted(orders.items(), key=lambda each: joins.get(each[0], 0)):
        begins = joins.get(name, 0)
        if order and begins > over:
            raise UserError(
                f"stream.joins: client {name} joins after round {begins}, and nobody works in "
                f"rounds {over + 1} to {begins}; let it join after round {over} or before"
            )
        over = max(over, begins + rounds * len(order))


def _check_client(name: str, clients: Sequence[str]) -> None:
    if name not in clients:
        raise UserError(
            f"stream names client '{name}' (orders, joins); the clients are {clients[0]} to "
            f"{clients[-1]}"
        )


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
