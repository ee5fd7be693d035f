"""Sums over records in a secure sum, and the heads that follow from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from numpy.typing import NDArray

from deal_core.aggregation import NUMERICAL, Aggregate
from deal_core.config.experiment import Experiment
from deal_core.data import public_labels
from deal_core.lora.state import State
from deal_core.methods import COUNT, SUM, Statistics, SumContext, Tensors, method_of, statistics_of
from deal_core.models import LabelVectors, LanguageModel, label_vectors, load_model
from deal_core.privacy.distributed_noise import COUNT_WEIGHT, grid_step
from deal_core.protection import class_sum_noise
from deal_core.secure_sum.layout import Layout
from deal_core.secure_sum.terms import LEAST_SITES
from deal_core.training.public_subspace import Subspace, text_vectors
from deal_core.wire.secure_layout import CLASS_SUMS, statistics_layout
from server import wire
from server.clients import Clients, instruction_of
from server.plan import Plan, Step
from server.secure_aggregation import Sums

ContextOf = Callable[[Sequence[str], float], SumContext]
"""Tasks, and the deviation of the noise, to what the server knows of their sums."""


@dataclass(frozen=True)
class PublicLabels:
    """What the server knows without any record: labels of tasks, and what the base model makes of
    their names.

    Attributes:
        tasks: of the stream.
    """

    experiment: Experiment
    tasks: tuple[str, ...]

    @cached_property
    def of(self) -> dict[str, Sequence[str]]:
        """Task to its labels; none where its answers are texts."""
        return {task: public_labels(self.experiment.data, task) for task in self.tasks}

    def names(self, tasks: Sequence[str]) -> list[str]:
        """Return the labels of several tasks, in their order."""
        return [label for task in tasks for label in self.of[task]]

    @cached_property
    def vectors(self) -> LabelVectors:
        """Unit vectors of names by the pretrained model."""
        return label_vectors(self.experiment.model)

    @cached_property
    def _model(self) -> LanguageModel:
        config = self.experiment
        return load_model(config.model, config.adapter, config.train.max_length)

    @cached_property
    def _subspace(self) -> Subspace:
        """The public directions in which clients add up their records."""
        statistics = statistics_of(method_of(self.experiment))
        assert statistics is not None
        return statistics.subspace(self.experiment.data, self._model, list(self.of.values()))

    def context(self, tasks: Sequence[str], deviation: float) -> SumContext:
        """Return what is known of the class sums of some tasks, whose noise has this deviation."""
        statistics = statistics_of(method_of(self.experiment))
        if not tasks or statistics is None:
            return SumContext(deviation, {}, None)
        subspace, layers = self._subspace, statistics.layers
        names = {
            task: subspace.project(text_vectors(self._model, self.of[task], layers, self.of[task]))
            for task in tasks
        }
        return SumContext(deviation, names, subspace)


@dataclass(frozen=True)
class ClassSums:
    """The sums over records of one round.

    Attributes:
        statistics: what is added up.
        tasks: each to the clients that have worked on it.
        labels: task to their number.
        stream: number of tasks of the run.
        context: what is known of sums.
    """

    clients: Clients
    step: Step
    statistics: Statistics
    tasks: Mapping[str, Sequence[str]]
    labels: Mapping[str, int]
    stream: int
    context: ContextOf

    @property
    def asked(self) -> dict[str, str]:
        """All that have worked on a task of the round, however few a round samples: sums are of all
        records, or of none that could be told apart."""
        own = {
            name: [task for task, clients in self.tasks.items() if name in clients]
            for name in self.clients.roster.clients
        }
        return {name: tasks[0] for name, tasks in own.items() if tasks}

    def layout(self, state: State, basis: str) -> Layout:
        """Return the layout of the sums of all tasks of the round."""
        config = self.clients.experiment
        shapes = [self.statistics.shapes(self.labels[task], config.model) for task in self.tasks]
        return statistics_layout(config, shapes, basis)

    def absorb(
        self, state: State, sums: Sums, members: int, given: Sequence[str]
    ) -> tuple[State, Aggregate | None]:
        """Return the state with the sums of each task that three clients or more have given.

        Args:
            state: before the round.
            sums: over the clients.
            members: how many were to give theirs, and shared the noise.
            given: those whose sums have arrived.
        """
        deviation, totals = self._deviation(members), dict[str, Tensors]()
        for place, (task, clients) in enumerate(self.tasks.items()):
            if len(set(clients) & set(given)) < LEAST_SITES:
                self.clients.event("sums_left_out", self.step, task=task)
            elif self.statistics.exact is None:
                totals[task] = self._class_sums(sums[f"{place}.{CLASS_SUMS}"])
            else:
                totals[task] = self._exact(sums, f"{place}.")
        if not totals:
            return state, None
        context = self.context([] if self.statistics.exact else list(totals), deviation)
        return self.statistics.absorb(state, totals, context), None

    def _exact(self, sums: Sums, place: str) -> Tensors:
        own = {
            name.removeprefix(place): torch.from_numpy(part)
            for name, part in sums.items()
            if name.startswith(place)
        }
        assert self.statistics.exact is not None
        self.statistics.exact.check(own)
        return own

    def _class_sums(self, numbers: NDArray[Any]) -> Tensors:
        """Counts and sums, in units of vectors, of whole numbers on the grid."""
        grid = grid_step(self.clients.experiment.privacy.max_grad_norm)
        values = grid * torch.from_numpy(numbers).double()
        return {COUNT: values[:, -1] / COUNT_WEIGHT, SUM: values[:, :-1]}

    def _deviation(self, members: int) -> float:
        """Standard deviation of the noise of all sites, in each entry."""
        if self.statistics.exact is not None:
            return 0.0
        config = self.clients.experiment
        multiplier, shares = class_sum_noise(config, self.statistics, members, self.stream)
        return multiplier * config.privacy.max_grad_norm * math.sqrt(members / shares)


def tasks_to_sum(
    plan: Plan, step: Step, statistics: Statistics, state: State, labels: Mapping[str, int]
) -> dict[str, list[str]]:
    """Return the tasks whose records are added up in a round, each to its clients. What is taken
    once is taken in the stage in which the last client works on the task; answers that are texts
    have no sums."""
    if statistics.once:
        ended = plan.ended(step.stage)
        tasks = {task: own for task, own in ended.items() if task not in state.heads}
    else:
        tasks = plan.at_work(step.stage, step.server_round)
    return {task: clients for task, clients in tasks.items() if labels[task]}


def found_worse(clients: Clients, step: Step, state: State, tasks: Sequence[str]) -> bool:
    """Return whether most clients that answer say that their own records are answered better
    without the heads of ``state``; ``tasks``: whose class means are new in it."""
    common = instruction_of(step, state)
    asked = common.model_copy(update={"tasks": tuple(tasks), "server_round": 0})
    sent = clients.ask(step, state, dict.fromkeys(clients.roster.clients, asked))
    worse: dict[str, bool] = {}
    for reply in clients.replies(sent):
        try:
            worse[reply.client] = wire.read_verdict(reply.answered())
        except wire.ClientSkipped:
            continue
        except NUMERICAL as fault:
            clients.event("client_failed", step, client=reply.client, reason=str(fault)[:400])
    against = sum(worse.values())
    if against:
        clients.event("class_means_doubted", step, tasks=list(tasks), by=against, of=len(worse))
    return 2 * against > len(worse)
