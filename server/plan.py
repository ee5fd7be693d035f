"""Who works on which task in which round: pure, so that a resumed run finds the plan it left.

Every client has an order of tasks and works ``rounds`` rounds on each; one that is through idles.
All clients consolidate together, every ``every`` rounds; what lies between two consolidations is a
stage. Where all clients have the same order and a stage is as long as a task, stages and tasks are
the same thing: that is the synchronous schedule. All tasks at once are one stage, with the rounds
of one task.

The clock is the federation's: a round in which a client is not sampled, or its reply is lost,
counts as one of its rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from deal_core.config.experiment import Experiment, StreamConfig
from deal_core.errors import UserError, choose
from deal_core.randomness import seeded

Order = tuple[str, ...]
"""Tasks, in the order in which a client works on them."""


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    Attributes:
        tasks: all, in the stream's order.
        orders: client name to its tasks.
        rounds: per task.
        every: rounds of learning per stage; the last stage may have fewer. Rounds of further phases
            come after them, with the clients and tasks of the last one.
        joint_tasks: every task is worked on in every round.
        trainers: clients that train, whatever their order says of the others; empty: all.
    """

    tasks: Order
    orders: Mapping[str, Order]
    rounds: int
    every: int
    joint_tasks: bool = False
    trainers: frozenset[str] = frozenset()

    @cached_property
    def stages(self) -> list[int]:
        """Rounds of each stage: the client with the most tasks decides how many there are."""
        total = self.rounds if self.joint_tasks else self.rounds * self._longest
        return [min(self.every, total - start) for start in range(0, total, self.every)]

    def working(self, stage: int, server_round: int) -> dict[str, str]:
        """Return client to task in a round (from 1 in every stage); who idles, or does not train,
        is not in it."""
        turn = self._turn(stage, server_round)
        return {name: order[turn] for name, order in self._trained.items() if turn < len(order)}

    def past(self, client: str, stage: int, server_round: int) -> Order:
        """What the client worked on before its task in a round."""
        return self.orders[client][: self._turn(stage, server_round)]

    def met(self, stage: int, server_round: int = 1) -> Order:
        """Return what the teacher of a round knows, in the stream's order: tasks that some client
        worked on before the stage, or, in the rounds of further phases, until its learning
        ended."""
        ended = stage + (server_round > self.stages[stage])
        begun = -(-ended * self.every // self.rounds)
        met = {task for order in set(self._trained.values()) for task in order[:begun]}
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

    def work(self, stage: int) -> dict[str, list[str]]:
        """Task, in the stream's order, to the clients whose turn it is in some round of a stage."""
        first = self._turn(stage, 1)
        last = len(self.tasks) if self.joint_tasks else self._turn(stage, self.stages[stage])
        clients: dict[str, list[str]] = {task: [] for task in self.tasks}
        for name, order in self.orders.items():
            for task in order[first : last + 1]:
                clients[task].append(name)
        return {task: names for task, names in clients.items() if names}

    @property
    def _trained(self) -> Mapping[str, Order]:
        """The orders of those that train."""
        if not self.trainers:
            return self.orders
        return {name: order for name, order in self.orders.items() if name in self.trainers}

    @property
    def _longest(self) -> int:
        return max(map(len, self.orders.values()))

    def _turn(self, stage: int, server_round: int) -> int:
        """Position in a client's order."""
        learning = min(server_round, self.stages[stage])
        return (stage * self.every + learning - 1) // self.rounds


def make_plan(experiment: Experiment, tasks: Sequence[str], clients: Sequence[str]) -> Plan:
    """Return the plan that ``stream.schedule`` asks for.

    Args:
        experiment: equal seeds give equal plans.
        tasks: of the stream, in its order.
        clients: names.

    Raises:
        UserError: ``stream.orders`` names what is not there, or no client meets some task.
    """
    stream, rounds = experiment.stream, experiment.federation.rounds
    trainers = frozenset(map(str, experiment.federation.participants))
    if stream.schedule != "per-client":
        joint_tasks = stream.schedule == "joint"
        orders = dict.fromkeys(clients, tuple(tasks))
        return Plan(tuple(tasks), orders, rounds, rounds, joint_tasks, trainers)
    for name, order in stream.orders.items():
        _check_order(name, order, tasks, clients)
    seed = experiment.run.seed
    orders = {name: _order(stream, name, tasks, seed) for name in clients}
    missed = set(tasks).difference(*orders.values())
    if missed:
        raise UserError(
            f"stream: no client meets the task '{next(t for t in tasks if t in missed)}'; name it "
            "in stream.orders, or raise stream.tasks_per_client or federation.clients"
        )
    every = stream.consolidate_every or rounds
    return Plan(tuple(tasks), orders, rounds, every, trainers=trainers)


def _order(stream: StreamConfig, client: str, tasks: Sequence[str], seed: int) -> Order:
    """What the experiment says, or a draw of so many tasks."""
    if client in stream.orders:
        return stream.orders[client]
    drawn = torch.randperm(len(tasks), generator=seeded(seed, "order", client)).tolist()
    return tuple(tasks[i] for i in drawn)[: stream.tasks_per_client or None]


def _check_order(name: str, order: Order, tasks: Sequence[str], clients: Sequence[str]) -> None:
    if name not in clients:
        raise UserError(
            f"stream.orders names client '{name}'; the clients are {clients[0]} to {clients[-1]}"
        )
    for position, task in enumerate(order):
        choose(f"task in stream.orders.{name}:", task, dict.fromkeys(tasks))
        if task in order[:position]:
            raise UserError(f"stream.orders.{name} names '{task}' twice; name each task once")
