"""Sums over records in a secure sum, and what the server knows of them without any record."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from deal_core.aggregation.rule import Aggregate
from deal_core.config.experiment import Experiment
from deal_core.data import public_labels
from deal_core.deal.class_means import COUNT, SUM
from deal_core.deal.interface import Statistics, SumContext, Tensors, statistics_of
from deal_core.errors import UserError
from deal_core.lora.state import State
from deal_core.methods import method_of
from deal_core.models import load_model
from deal_core.models.encoder import EncoderLabels
from deal_core.models.interface import LanguageModel
from deal_core.privacy.distributed_noise import COUNT_WEIGHT, grid_step
from deal_core.protection import class_sum_noise
from deal_core.secure_sum.layout import Layout
from deal_core.secure_sum.terms import LEAST_SITES
from deal_core.training.public_subspace import Subspace, text_vectors
from deal_core.wire.secure_layout import CLASS_SUMS, statistics_layout
from server.plan import Plan, Step
from server.secure_aggregation import Sums
from server.summation import MaskedSum


@dataclass(kw_only=True)
class ClassSums(MaskedSum):
    """Sums over records.

    Attributes:
        statistics: what is added up.
        summed: tasks of the round, each to the clients that have worked on it.
        classes: task to their number.
        stream: number of tasks of the run.
        context: tasks, and the deviation of the noise, to what the server knows of their sums.
    """

    statistics: Statistics
    summed: Mapping[str, Sequence[str]]
    classes: Mapping[str, int]
    stream: int
    context: Callable[[Sequence[str], float], SumContext]

    def layout(self, state: State, basis: str) -> Layout:
        """Return the layout of the sums of all tasks of the round."""
        config = self.clients.experiment
        shapes = [self.statistics.shapes(self.classes[task], config.model) for task in self.summed]
        return statistics_layout(config, shapes, basis)

    def absorb(
        self, state: State, sums: Sums, members: int, given: Sequence[str]
    ) -> tuple[State, Aggregate | None]:
        """Return the state with the sums of each task that three clients or more have given."""
        config, exact = self.clients.experiment, self.statistics.exact
        bound, totals, deviation = config.privacy.max_grad_norm, dict[str, Tensors](), 0.0
        for place, (task, clients) in enumerate(self.summed.items()):
            prefix = f"{place}."
            if len(set(clients) & set(given)) < LEAST_SITES:
                self.clients.event("sums_left_out", self.step, task=task)
            elif exact is None:  # whole numbers on the grid: counts and sums, in units of vectors
                values = grid_step(bound) * torch.from_numpy(sums[prefix + CLASS_SUMS]).double()
                totals[task] = {COUNT: values[:, -1] / COUNT_WEIGHT, SUM: values[:, :-1]}
                counts = (totals[task][COUNT] / min(1.0, bound)).round().long().tolist()
                self.clients.event("class_sums", self.step, task=task, records=counts)
            else:
                totals[task] = {
                    name.removeprefix(prefix): torch.from_numpy(part)
                    for name, part in sums.items()
                    if name.startswith(prefix)
                }
                exact.check(totals[task])
        if not totals:
            return state, None
        if exact is None:  # of the noise of all sites, in each entry
            multiplier, shares = class_sum_noise(config, self.statistics, members, self.stream)
            deviation = multiplier * bound * math.sqrt(members / shares)
        context = self.context([] if exact else list(totals), deviation)
        return self.statistics.absorb(state, totals, context), None


def tasks_to_sum(
    plan: Plan, step: Step, statistics: Statistics, state: State, classes: Mapping[str, int]
) -> dict[str, list[str]]:
    """Return the tasks whose records are added up in a round, each to its clients. What is taken
    once is taken in the stage in which the last client works on the task; a task without
    ``classes`` has no sums."""
    if statistics.once:
        ended = plan.ended(step.stage)
        tasks = {task: own for task, own in ended.items() if task not in state.heads}
    else:
        tasks = plan.at_work(step.stage, step.server_round)
    return {task: clients for task, clients in tasks.items() if classes[task]}


def clients_to_ask(tasks: Mapping[str, Sequence[str]], clients: Sequence[str]) -> dict[str, str]:
    """Return all clients that have worked on one of some tasks, each to its first, however few a
    round samples: sums are of all records, or of none that could be told apart."""
    own = {name: [task for task, workers in tasks.items() if name in workers] for name in clients}
    return {name: first[0] for name, first in own.items() if first}


@dataclass(frozen=True)
class PublicLabels:
    """What the server knows without any record: labels of the stream's tasks, and what the base
    model makes of their names."""

    experiment: Experiment
    tasks: tuple[str, ...]

    @cached_property
    def of(self) -> dict[str, Sequence[str]]:
        """Task to its labels; none where its answers are texts."""
        return {task: public_labels(self.experiment.data, task) for task in self.tasks}

    def names(self, tasks: Sequence[str]) -> list[str]:
        """Return the labels of several tasks, in their order."""
        return [label for task in tasks for label in self.of[task]]

    def vectors(self, names: Sequence[str]) -> Tensor:
        """Return unit vectors of names by the pretrained model, ``(names, size)``.

        Raises:
            UserError: the model's family has none.
        """
        if not isinstance(self._model, EncoderLabels):
            family = self.experiment.model.family
            raise UserError(f"model.family '{family}' has no vectors of label names")
        return self._model.label_vectors(names).cpu()

    @cached_property
    def _model(self) -> LanguageModel:
        config = self.experiment
        return load_model(config.model, config.adapter, config.train.max_length)

    @cached_property
    def _subspace(self) -> Subspace:
        statistics = statistics_of(method_of(self.experiment))
        assert statistics is not None
        return statistics.subspace(self.experiment.data, self._model, list(self.of.values()))

    def context(self, tasks: Sequence[str], deviation: float) -> SumContext:
        """Return what is known of the class sums of some tasks, whose noise has this deviation."""
        statistics = statistics_of(method_of(self.experiment))
        if not tasks or statistics is None:
            return SumContext(deviation, {}, None)
        subspace, names = self._subspace, {}
        for task in tasks:
            labels = self.of[task]
            asked = () if statistics.routes else labels
            names[task] = torch.zeros(1, subspace.directions.shape[1])  # texts have no name
            if labels:
                vectors = text_vectors(self._model, labels, statistics.layers, asked)
                names[task] = subspace.project(vectors)
        return SumContext(deviation, names, subspace)
