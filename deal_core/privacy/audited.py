"""A mechanism under audit: what it does, with canaries in it, and a witness of every update.

The witness sees what an adversary sees, the factors before and after a local training. Nothing of
it can be asked for by a server: an audit builds its clients itself, and only in a simulation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from deal_core.attach import learning_factors
from deal_core.config import Experiment
from deal_core.methods.interface import Objective
from deal_core.models.interface import Encoded, LanguageModel
from deal_core.privacy.canaries import GradientCanaries
from deal_core.privacy.counts import Counts
from deal_core.privacy.interface import Ask, Gradients, Mechanism, Probes, Site, Trained
from deal_core.privacy.noise import SeededNoise
from deal_core.privacy.none import NoMechanism, Ordinary
from deal_core.privacy.record import RecordMechanism
from deal_core.randomness import seeded

Factors = Mapping[str, Tensor]
"""Name of a factor to its value or its change."""


class Witness(Protocol):
    """Sees every update of the audited site."""

    def update(self, change: Factors) -> None:
        """One local training has changed what it trained by so much."""

    def model(self, ask: Ask, model: LanguageModel, labels: Sequence[str]) -> None:
        """The model of the site after a local training; may score, must not change it."""


@dataclass
class Watched:
    """Gradients as they are, with the witness told at the end.

    Attributes:
        inner: the mechanism's.
        ask: the round.
    """

    inner: Gradients
    ask: Ask
    witness: Witness
    _before: dict[str, Tensor] = field(default_factory=dict)

    @property
    def data(self) -> Sequence[Encoded]:
        """As it is."""
        return self.inner.data

    def rehearse(self, module: nn.Module, objective: Objective, probes: int) -> None:
        """As it is."""
        self.inner.rehearse(module, objective, probes)

    def batches(self) -> Iterable[Sequence[int]]:
        """As they are."""
        return self.inner.batches()

    def accumulate(self, module: nn.Module, objective: Objective, batch: Sequence[int]) -> float:
        """As it is."""
        if not self._before:
            self._before = _values(module)
        return self.inner.accumulate(module, objective, batch)

    def stepped(self, module: nn.Module) -> None:
        """As it is."""
        self.inner.stepped(module)

    def finished(self, model: LanguageModel, labels: Sequence[str], probes: Probes) -> None:
        """As it is; then the witness sees what will be released."""
        self.inner.finished(model, labels, probes)
        if self._before:
            after = _values(model.module)
            self.witness.update({name: after[name] - self._before[name] for name in after})
        self.witness.model(self.ask, model, labels)


def _values(module: nn.Module) -> dict[str, Tensor]:
    return {name: f.detach().cpu().clone() for name, f in learning_factors(module).items()}


@dataclass(frozen=True)
class PlantedOrdinary:
    """Ordinary gradients with canaries in the mean: where nothing is clipped, nothing is hidden.

    Attributes:
        inner: without canaries.
        norm: of a canary's gradient.
        noise: draws which canaries are in a step, as often as a record is.
    """

    inner: Ordinary
    canaries: GradientCanaries
    norm: float
    noise: SeededNoise

    @property
    def data(self) -> Sequence[Encoded]:
        """As it is."""
        return self.inner.data

    def rehearse(self, module: nn.Module, objective: Objective, probes: int) -> None:
        """As it is."""
        self.inner.rehearse(module, objective, probes)

    def batches(self) -> Iterable[Sequence[int]]:
        """As they are."""
        return self.inner.batches()

    def accumulate(self, module: nn.Module, objective: Objective, batch: Sequence[int]) -> float:
        """Add the batch's mean gradient and the sampled canaries', each as one of the batch."""
        loss = self.inner.accumulate(module, objective, batch)
        sampled = self.canaries.sampled(len(batch) / len(self.inner.data), self.noise)
        self.canaries.add(sampled, learning_factors(module), self.norm / len(batch))
        return loss

    def stepped(self, module: nn.Module) -> None:
        """As it is."""
        self.inner.stepped(module)

    def finished(self, model: LanguageModel, labels: Sequence[str], probes: Probes) -> None:
        """As it is."""
        self.inner.finished(model, labels, probes)


@dataclass(frozen=True)
class PlantedNone:
    """Mechanism ``none`` with canaries in its gradients."""

    experiment: Experiment
    canaries: GradientCanaries
    unit: str | None = None

    def trained(self, factors: frozenset[str]) -> frozenset[str]:
        """As ``none``."""
        return factors

    def release(self, ask: Ask, site: Site, make: Callable[[Gradients], Trained]) -> Trained:
        """As ``none``."""
        where = self.canaries.seed, "none", ask.stage, ask.server_round
        norm = self.experiment.privacy.max_grad_norm

        def planted(gradients: Gradients) -> Trained:
            assert isinstance(gradients, Ordinary)
            noise = SeededNoise(seeded(*where))
            return make(PlantedOrdinary(gradients, self.canaries, norm, noise))

        return NoMechanism(self.experiment).release(ask, site, planted)

    def count(self, ask: Ask, site: Site, make: Callable[[], Counts]) -> Counts:
        """As ``none``."""
        return NoMechanism(self.experiment).count(ask, site, make)


@dataclass(frozen=True)
class Audited:
    """A mechanism with a witness.

    Attributes:
        inner: it, with or without canaries.
    """

    inner: Mechanism
    witness: Witness

    @property
    def unit(self) -> str | None:
        """As it is."""
        return self.inner.unit

    def trained(self, factors: frozenset[str]) -> frozenset[str]:
        """As it is."""
        return self.inner.trained(factors)

    def release(self, ask: Ask, site: Site, make: Callable[[Gradients], Trained]) -> Trained:
        """As it is, before the witness.

        Raises:
            Refusal: as it is.
        """
        return self.inner.release(
            ask, site, lambda gradients: make(Watched(gradients, ask, self.witness))
        )

    def count(self, ask: Ask, site: Site, make: Callable[[], Counts]) -> Counts:
        """As it is."""
        return self.inner.count(ask, site, make)


def planted_record(experiment: Experiment, canaries: GradientCanaries) -> Mechanism:
    """Mechanism ``record`` with canaries in its clipped sum."""
    return RecordMechanism(experiment, make_sum=canaries.clipped_sum)


PLANTED: Mapping[str, Callable[[Experiment, GradientCanaries], Mechanism]] = {
    "none": PlantedNone,
    "record": planted_record,
}
"""``privacy.mechanism`` to it with gradient canaries."""
