"""Sums of embeddings in a secure sum: as they are, or with noise that hides every record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deal_core.aggregation import Aggregate
from deal_core.config.experiment import Experiment
from deal_core.lora.state import State
from deal_core.methods import SumNoise, Tensors
from deal_core.models import embedding_size
from deal_core.privacy.mechanisms.noisy_class_sums import COUNT_WEIGHT
from deal_core.privacy.mechanisms.noisy_sum import grid_step
from deal_core.privacy.mechanisms.shares import sum_deviation
from deal_core.privacy.policy import at_server
from deal_core.secure_sum.layout import Layout
from deal_core.wire.secure_layout import CLASS_SUMS, statistics_layout
from server.checkpoint import History
from server.round_sum import Sums
from server.statistics.round import StatisticsRound


@dataclass(frozen=True)
class StatisticsSum:
    """Attributes: the ``round``; ``vectors``, task to the frozen vectors of its label names."""

    round: StatisticsRound
    vectors: Callable[[str], Tensor]

    @property
    def trained(self) -> frozenset[str]:
        """Nothing is trained."""
        return frozenset()

    def clients(self, history: History) -> dict[str, str]:
        """Return those that have not given their sums."""
        return self.round.asked(history)

    def layout(self, state: State, basis: str) -> Layout:
        """Return that of the sums of all tasks of the round."""
        statistics = self.round.statistics
        labels = [self.round.labels[task] for task in self._tasks]
        size = embedding_size(self._config.model, statistics.layers)
        return statistics_layout(self._config, statistics.shapes, size, labels, basis)

    def add(self, state: State, sums: Sums) -> tuple[State, Aggregate | None]:
        """Return the state with the sums. Those over all sites are checked as one site's are."""
        statistics, tasks = self.round.statistics, self._tasks
        if statistics.absorb_noised is not None and at_server(self._config):
            names = {task: self.vectors(task) for task in tasks}
            totals = {tasks[0]: self._class_sums(sums)}
            return statistics.absorb_noised(state, totals, SumNoise(self._deviation, names)), None
        totals = {}
        for place, task in enumerate(tasks):
            own = {
                name.partition(".")[2]: torch.from_numpy(part)
                for name, part in sums.items()
                if name.startswith(f"{place}.")
            }
            if any(bool(part.any()) for part in own.values()):
                statistics.check(own)
                totals[task] = own
        return statistics.absorb(state, totals), None

    def noted(self, history: History, summed: Mapping[str, str]) -> History:
        """Return the history with whom the sums are of."""
        return self.round.noted(history, summed, {})

    @property
    def _config(self) -> Experiment:
        return self.round.round.experiment

    @property
    def _tasks(self) -> Sequence[str]:
        """Of the round: all at once, or the one that all clients work on."""
        one = self.round.round
        return (
            one.plan.tasks
            if one.plan.joint_tasks
            else list(dict.fromkeys(self.round.eligible.values()))
        )

    def _class_sums(self, sums: Sums) -> Tensors:
        """The sums of embeddings and the counts, of noisy class sums on the grid."""
        grid = grid_step(self._config.privacy.max_grad_norm)
        values = grid * torch.from_numpy(sums[CLASS_SUMS]).double()
        return {"count": values[:, -1] / COUNT_WEIGHT, "sum": values[:, :-1]}

    @property
    def _deviation(self) -> float:
        """Standard deviation of the noise of all sites, in each entry."""
        config, tasks = self._config, len(self.round.round.plan.tasks)
        return sum_deviation(config, tasks) * config.privacy.max_grad_norm
