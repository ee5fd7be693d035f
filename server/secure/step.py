"""What becomes of a secure sum: a step of the server's optimiser, or the mean of updates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from deal_core.aggregation import Aggregate, AggregationRule, ClientUpdate, finished
from deal_core.config.experiment import Experiment
from deal_core.lora.kinds import kind_of
from deal_core.lora.learnt import changed
from deal_core.lora.state import State
from deal_core.privacy.mechanisms.noisy_sum import grid_step
from deal_core.privacy.mechanisms.shares import sum_deviation
from deal_core.secure_sum.weighted import weighted_means
from deal_core.wire.secure_layout import EXAMPLES
from server.round_sum import Sums
from server.schedule import Step
from server.state_change import fold_residual

SumStep = Callable[[State, Sums, Step], tuple[State, Aggregate | None]]
"""From the state before a round, its sums and its place, to the state after it and what was
aggregated."""


@dataclass(frozen=True)
class GradientStep:
    """A step of gradient descent on a sum of clipped gradients and noise.

    Attributes:
        tasks: number of them in the run.
    """

    experiment: Experiment
    tasks: int

    def __call__(self, state: State, sums: Sums, step: Step) -> tuple[State, Aggregate | None]:
        """Return the state after the step: (M59)."""
        examples = max(1, int(sums[EXAMPLES][0]))
        unit = grid_step(self.experiment.privacy.max_grad_norm) * self._rate(examples) / examples
        change = {
            key: torch.from_numpy(-unit * part) for key, part in sums.items() if key != EXAMPLES
        }
        core = kind_of(self.experiment.adapter).core
        return replace(state, current=changed(state.current, change, core)), None

    def _rate(self, examples: int) -> float:
        """The learning rate, lowered where a step has much noise."""
        config = self.experiment
        rate, limit = config.train.learning_rate, config.train.noise_per_example
        if config.privacy.mechanism == "none" or not limit:
            return rate
        return min(rate, limit * examples / sum_deviation(config, self.tasks))


@dataclass(frozen=True)
class MeanUpdate:
    """The rule's aggregate of the weighted mean of all updates, as if it were one client's."""

    rule: AggregationRule

    def __call__(self, state: State, sums: Sums, step: Step) -> tuple[State, Aggregate | None]:
        """Return the state after the round."""
        means = {key: torch.from_numpy(part) for key, part in weighted_means(sums).items()}
        after = changed(state.current, means, core=False)
        trained = self.rule.trained(step.server_round)
        aggregation = self.rule.begin(state.current, step.server_round)
        aggregation.add(ClientUpdate("all", after, 1.0))
        aggregate = finished(aggregation)
        if len(trained) > 1:  # what the mean of each factor loses shows in single updates alone
            aggregate = replace(aggregate, error=None)
        return fold_residual(state, aggregate), aggregate
