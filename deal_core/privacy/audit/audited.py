"""A mechanism under audit, as it is, with a witness of the models that a site hands over.

Nothing of it can be asked for by a server: an audit builds its clients itself, and only in a
simulation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import nn

from deal_core.lora.per_example import ExampleLosses
from deal_core.models.interface import Encoded, LanguageModel
from deal_core.privacy.interface import (
    Counts,
    Gradients,
    GradientSum,
    LocalUpdate,
    Mechanism,
    Permit,
    Probes,
    Site,
    UpdateRequest,
)


def watched(permit: Permit, watch: Callable[[Gradients], Gradients]) -> Permit:
    """Return the permit, with all of its gradients under observation.

    Raises:
        TypeError: it has no steps that could be observed, but one sum.
    """
    noise_only = None if permit.noise_only is None else watch(steps_of(permit.noise_only))
    return replace(permit, gradients=watch(steps_of(permit.gradients)), noise_only=noise_only)


def steps_of(gradients: Gradients | GradientSum) -> Gradients:
    """Return gradients that are taken in steps at the site.

    Raises:
        TypeError: the site takes none.
    """
    if isinstance(gradients, GradientSum):
        raise TypeError("the steps are taken at the server")
    return gradients


class Witness(Protocol):
    """Sees every model of the audited site."""

    def model(self, ask: UpdateRequest, model: LanguageModel, labels: Sequence[str]) -> None:
        """The model of the site after a local training; may score, must not change it."""


@dataclass(frozen=True)
class Witnessed:
    """Gradients as they are, with the witness told at the end.

    Attributes:
        inner: the mechanism's.
        ask: the round.
        witness: sees the model at the end.
    """

    inner: Gradients
    ask: UpdateRequest
    witness: Witness

    @property
    def data(self) -> Sequence[Encoded]:
        """The examples that the mechanism lets be read."""
        return self.inner.data

    def rehearse(self, module: nn.Module, objective: ExampleLosses, probes: int) -> None:
        """Let the mechanism's own gradients try the objective out."""
        self.inner.rehearse(module, objective, probes)

    def batches(self) -> Iterable[Sequence[int]]:
        """Return the batches of the mechanism's own gradients."""
        return self.inner.batches()

    def accumulate(
        self, module: nn.Module, objective: ExampleLosses, batch: Sequence[int]
    ) -> float:
        """Add the gradient of the mechanism; return its loss."""
        return self.inner.accumulate(module, objective, batch)

    def stepped(self, module: nn.Module) -> None:
        """Tell the mechanism's own gradients that the optimiser has moved."""
        self.inner.stepped(module)

    def finished(self, model: LanguageModel, labels: Sequence[str], probes: Probes) -> None:
        """End the mechanism's own gradients; then show the witness what will be released."""
        self.inner.finished(model, labels, probes)
        self.witness.model(self.ask, model, labels)


@dataclass(frozen=True)
class Overseen:
    """A mechanism whose leave to read records somebody looks at, and may change.

    Attributes:
        inner: the mechanism beneath.
        granted: returns the leave that a request gets in the end.
        asked: returns the request that the mechanism beneath gets.
    """

    inner: Mechanism
    granted: Callable[[UpdateRequest, Permit], Permit]
    asked: Callable[[UpdateRequest], UpdateRequest] = lambda ask: ask

    @property
    def unit(self) -> str | None:
        """What the mechanism beneath protects; None: nothing."""
        return self.inner.unit

    def trained(self, factors: frozenset[str]) -> frozenset[str]:
        """Return the factors that the mechanism beneath lets learn."""
        return self.inner.trained(factors)

    def permit(self, ask: UpdateRequest, site: Site) -> Permit | LocalUpdate:
        """Return the leave of the mechanism beneath as it is granted, or the update that the same
        request was answered with.

        Raises:
            Refusal: the mechanism takes no part.
        """
        permit = self.inner.permit(self.asked(ask), site)
        return permit if isinstance(permit, LocalUpdate) else self.granted(ask, permit)

    def count(self, ask: UpdateRequest, site: Site, make: Callable[[], Counts]) -> Counts:
        """Return the counts as the mechanism beneath lets them go."""
        return self.inner.count(ask, site, make)


def audited(inner: Mechanism, witness: Witness) -> Overseen:
    """Return the mechanism with a witness, who sees every model that the site hands over."""

    def granted(ask: UpdateRequest, permit: Permit) -> Permit:
        return watched(permit, lambda gradients: Witnessed(gradients, ask, witness))

    return Overseen(inner, granted)
