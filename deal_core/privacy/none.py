"""Mechanism ``none``: ordinary gradients; what leaves carries no guarantee."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from deal_core.batching import training_batches, within_budget
from deal_core.config import Experiment, TrainConfig
from deal_core.methods.interface import Objective
from deal_core.models.interface import Encoded, LanguageModel
from deal_core.privacy.counts import Counts
from deal_core.privacy.interface import Ask, Gradients, Refusal, Site, Trained
from deal_core.privacy.policy import figures_allowed, metrics_allowed


@dataclass(frozen=True)
class Ordinary:
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
        """``epochs`` passes over the data."""
        for _ in range(self.epochs):
            yield from training_batches(self.data, self.config.batch_size, self.generator)

    def accumulate(self, module: nn.Module, objective: Objective, batch: Sequence[int]) -> float:
        """As :func:`mean_gradient`."""
        return mean_gradient(objective, self.data, batch, self.config.tokens_per_pass)

    def stepped(self, module: nn.Module) -> None:
        """A step may change nothing."""

    def finished(self, model: LanguageModel, labels: Sequence[str]) -> None:
        """Nothing to check."""


def mean_gradient(
    objective: Objective, data: Sequence[Encoded], batch: Sequence[int], tokens: int
) -> float:
    """Add the gradient of the batch's mean loss, pass by pass; return that loss.

    The sum over passes is the gradient of the mean over the batch: cutting changes memory and
    rounding, not the step.
    """
    total = 0.0
    for part in within_budget(data, batch, tokens):
        loss = objective.example_losses(part).sum() / len(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total


@dataclass(frozen=True)
class NoMechanism:
    """Attributes: the ``experiment``, for epochs and batches."""

    experiment: Experiment
    unit: str | None = None

    def trained(self, factors: frozenset[str]) -> frozenset[str]:
        """Those of the rule."""
        return factors

    def release(self, ask: Ask, site: Site, make: Callable[[Gradients], Trained]) -> Trained:
        """Train, and let go what the site's policy lets go.

        Raises:
            Refusal: there is nothing to learn from.
        """
        if not ask.data:
            raise Refusal("no-data", f"no example of task '{ask.task}'")
        config = self.experiment
        epochs = config.federation.local_epochs
        made = make(Ordinary(ask.data, epochs, config.train, ask.generator))
        return replace(made, figures=figures_allowed(made.figures, site.policy))

    def count(self, ask: Ask, site: Site, make: Callable[[], Counts]) -> Counts:
        """In the clear, or not at all: there is no ledger that noise could be charged to."""
        if metrics_allowed(self.experiment.privacy.metrics, site.policy) != "clear":
            raise Refusal("withheld", "counts of right answers do not leave this site")
        return make()


def make_none(experiment: Experiment) -> NoMechanism:
    """Build from the experiment."""
    return NoMechanism(experiment)
