"""What the optimiser moves: the factors themselves, or parameters that they are made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from deal_core.lora.attach import set_trainable


class Parametrization(Protocol):
    """Follows the optimiser through one local training."""

    @property
    def parameters(self) -> Sequence[Tensor]:
        """What the optimiser moves."""

    def before_step(self) -> None:
        """The factors' gradients are complete; make them the parameters'."""

    def after_step(self) -> None:
        """The parameters have moved; let the factors follow."""

    def finish(self) -> None:
        """The last step is done."""


@runtime_checkable
class Reparametrized(Protocol):
    """An objective whose factors are made from parameters of its own.

    All that data says reaches them through the factors' gradients, so whatever is done to those
    (clipping, noise) is done before.
    """

    def parametrization(self, module: nn.Module, trained: frozenset[str]) -> Parametrization:
        """For a model that holds the factors of the round.

        Args:
            module: see :func:`~deal_core.lora.attach.attach`.
            trained: which factors learn, of ``{"lora_A", "lora_B"}``.
        """


@dataclass(frozen=True)
class Factors:
    """The factors themselves."""

    parameters: Sequence[Tensor]

    def before_step(self) -> None:
        """Do nothing: the factors have their gradients already."""

    def after_step(self) -> None:
        """Do nothing: the optimiser has moved the factors themselves."""

    def finish(self) -> None:
        """Do nothing: the factors stand in the model."""


def parametrization_of(
    objective: object, module: nn.Module, trained: frozenset[str]
) -> Parametrization:
    """Return what an objective wants moved; exactly the ``trained`` factors get a gradient."""
    factors = set_trainable(module, trained)
    if isinstance(objective, Reparametrized):
        return objective.parametrization(module, trained)
    return Factors(factors)
