"""Ordinary gradients: the mean over each batch, with no promise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from deal_core.config.experiment import TrainConfig
from deal_core.models.interface import Encoded, LanguageModel
from deal_core.training.batching import WINDOW, training_batches, within_budget
from deal_core.training.gradients import Probes
from deal_core.training.objective import Objective


@dataclass(frozen=True)
class NonPrivateGradients:
    """Every example once an epoch, in batches of similar length.

    Attributes:
        data: the client's tokenised examples; may be empty, then there is no batch.
        config: batch size, tokens in one pass.
        generator: orders the examples; the only randomness.
    """

    data: Sequence[Encoded]
    epochs: int
    config: TrainConfig
    generator: torch.Generator

    def batches(self) -> Iterator[list[int]]:
        """Yield ``epochs`` passes over the data."""
        for _ in range(self.epochs):
            yield from training_batches(self.data, self.config.batch_size, self.generator, WINDOW)

    def rehearse(self, module: nn.Module, objective: Objective, probes: int) -> None:
        """Nothing is promised, so nothing is tried out."""

    def accumulate(self, module: nn.Module, objective: Objective, batch: Sequence[int]) -> float:
        """As :func:`mean_gradient`."""
        return mean_gradient(objective, self.data, batch, self.config.tokens_per_microbatch)

    def stepped(self, module: nn.Module) -> None:
        """Do nothing: without a promise there is nothing to check."""

    def finished(self, model: LanguageModel, labels: Sequence[str], probes: Probes) -> None:
        """Nothing to check."""


def mean_gradient(
    objective: Objective, data: Sequence[Encoded], batch: Sequence[int], tokens: int
) -> float:
    """Return the batch's mean loss, after its gradient was added pass by pass.

    The sum over passes is the gradient of the mean over the batch: cutting changes memory and
    rounding, not the step.
    """
    total = 0.0
    for part in within_budget(data, batch, tokens):
        loss = objective.example_losses(part).sum() / len(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total
