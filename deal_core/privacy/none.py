"""Mechanism ``none``: ordinary gradients; what leaves carries no guarantee."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from deal_core.batching import training_batches, within_budget
from deal_core.config import Experiment, TrainConfig
from deal_core.ledger import unprotected_event
from deal_core.methods.interface import Objective
from deal_core.models.interface import Encoded, LanguageModel
from deal_core.privacy.counts import Counts
from deal_core.privacy.interface import Ask, Gradients, Probes, Refusal, Site, Trained
from deal_core.privacy.policy import figures_allowed, metrics_allowed
from deal_core.privacy.run_name import run_name


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

    def rehearse(self, module: nn.Module, objective: Objective, probes: int) -> None:
        """Nothing is promised, so nothing is tried out."""

    def accumulate(self, module: nn.Module, objective: Objective, batch: Sequence[int]) -> float:
        """As :func:`mean_gradient`."""
        return mean_gradient(objective, self.data, batch, self.config.tokens_per_pass)

    def stepped(self, module: nn.Module) -> None:
        """A step may change nothing."""

    def finished(self, model: LanguageModel, labels: Sequence[str], probes: Probes) -> None:
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
class PublicTexts:
    """Learning from texts that are nobody's: no record is read, so nothing is protected, noted or
    withheld. Attributes: the ``experiment``, for epochs and batches."""

    experiment: Experiment
    unit: str | None = None

    def trained(self, factors: frozenset[str]) -> frozenset[str]:
        """Those of the rule."""
        return factors

    def release(self, ask: Ask, site: Site, make: Callable[[Gradients], Trained]) -> Trained:
        """Train on the texts, and let the update go."""
        config = self.experiment
        epochs = config.federation.local_epochs
        made = make(Ordinary(ask.data, epochs, config.train, ask.generator))
        return replace(made, figures=figures_allowed(made.figures, site.policy))

    def count(self, ask: Ask, site: Site, make: Callable[[], Counts]) -> Counts:
        """Raise :class:`Refusal`: nobody's texts have no right answers."""
        raise Refusal("withheld", "public texts have no answers to count")


@dataclass(frozen=True)
class NoMechanism:
    """Attributes: the ``experiment``, for epochs and batches."""

    experiment: Experiment
    unit: str | None = None

    def trained(self, factors: frozenset[str]) -> frozenset[str]:
        """Those of the rule."""
        return factors

    def release(self, ask: Ask, site: Site, make: Callable[[Gradients], Trained]) -> Trained:
        """Train, and let go what the site's policy lets go; a site notes that it did so.

        Raises:
            Refusal: there is nothing to learn from, or fewer records than the policy lets go
                without protection.
        """
        least = max(1, site.policy.min_records if site.policy is not None else 1)
        if len(ask.data) < least:
            raise Refusal("no-data", f"fewer than {least} records of task '{ask.task}'")
        config = self.experiment
        epochs = config.federation.local_epochs
        made = make(Ordinary(ask.data, epochs, config.train, ask.generator))
        note_unprotected(self.experiment, ask, site, "none")
        return replace(made, figures=figures_allowed(made.figures, site.policy))

    def count(self, ask: Ask, site: Site, make: Callable[[], Counts]) -> Counts:
        """In the clear, or not at all: there is no ledger that noise could be charged to."""
        if metrics_allowed(self.experiment.privacy.metrics, site.policy) != "clear":
            raise Refusal("withheld", "counts of right answers do not leave this site")
        return clear_counts(self.experiment, ask, site, make)


def clear_counts(
    experiment: Experiment, ask: Ask, site: Site, make: Callable[[], Counts]
) -> Counts:
    """Counts as they are; a site notes that they have left."""
    counts = make()
    note_unprotected(experiment, ask, site, "clear-counts")
    return counts


def note_unprotected(experiment: Experiment, ask: Ask, site: Site, mechanism: str) -> None:
    """Write into a real site's ledger that something has left without protection: of its records
    no epsilon holds."""
    if site.simulated:
        return
    place = ask.task, ask.phase, ask.stage, ask.server_round
    site.ledger().note(unprotected_event(run_name(experiment), mechanism, place))


def make_none(experiment: Experiment) -> NoMechanism:
    """Build from the experiment."""
    return NoMechanism(experiment)
