"""An objective whose factors are made by maps: maps learn, factors follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deal_core.lora.attach import factors_in
from deal_core.methods.deal_reference.factor_map import FactorMap
from deal_core.methods.interface import RoundState, Tensors
from deal_core.training.objective import Objective
from deal_core.training.parametrization import Parametrization


@dataclass(frozen=True)
class Mapped:
    """Losses of the data, and a price of the maps.

    Attributes:
        objective: on the data; without a penalty of its own.
        maps: key of a factor to its map, as the round begins.
        price: of the maps that learn, added once a step.
        round_state: keeps the maps for the client's next round, under ``basis``.
    """

    objective: Objective
    maps: Mapping[str, FactorMap]
    price: Callable[[Sequence[FactorMap]], Tensor]
    round_state: RoundState | None
    basis: str

    def example_losses(self, batch: Sequence[int]) -> Tensor:
        """Return the losses of the objective on the data, ``(batch,)``."""
        return self.objective.example_losses(batch)

    def penalty(self) -> Tensor | None:
        """Return the price of the maps that learn."""
        learning = [m for m in self.maps.values() if m.gate.gains.requires_grad]
        return self.price(learning) if learning else None

    def parametrization(self, module: nn.Module, trained: frozenset[str]) -> Parametrization:
        """Moves the maps of the ``trained`` factors; what they were is kept when it has done so."""
        keys = [key for key in self.maps if key.rsplit(".", 1)[1] in trained]
        factors = factors_in(module)
        return MapLearner(
            [factors[key] for key in keys], [self.maps[key] for key in keys], self._keep
        )

    def _keep(self) -> None:
        if self.round_state is not None:
            self.round_state.save(self.basis, flat(self.maps))


class MapLearner:
    """``factor = received + map(now) - map(as the round began)``."""

    def __init__(
        self,
        factors: Sequence[nn.Parameter],
        maps: Sequence[FactorMap],
        finish: Callable[[], None],
    ) -> None:
        self._factors, self._maps = factors, maps
        self.finish = finish
        self.parameters = [t.requires_grad_() for m in maps for t in m.named().values()]
        self._made = [m.factor() for m in maps]
        with torch.no_grad():
            self._beside = [f - made for f, made in zip(factors, self._made, strict=True)]

    def before_step(self) -> None:
        """Take the factors' gradients back through the maps."""
        pairs = zip(self._made, self._factors, strict=True)
        reached = [(made, f.grad) for made, f in pairs if f.grad is not None]
        if reached:
            made, gradients = zip(*reached, strict=True)
            torch.autograd.backward(made, gradients)
        for factor in self._factors:
            factor.grad = None

    def after_step(self) -> None:
        """Make the factors anew, in place."""
        self._made = [m.factor() for m in self._maps]
        with torch.no_grad():
            for factor, made, beside in zip(self._factors, self._made, self._beside, strict=True):
                factor.copy_(made + beside)


def carried_maps(
    fresh: Mapping[str, FactorMap], round_state: RoundState | None, basis: str, device: torch.device
) -> dict[str, FactorMap]:
    """Return the maps as the client's latest round of the task left them; fresh ones where none
    did."""
    kept = round_state.load(basis) if round_state is not None else {}
    return {key: m.at(_of(key, kept), device) for key, m in fresh.items()}


def flat(maps: Mapping[str, FactorMap]) -> Tensors:
    """Return all that the maps have learned, on the CPU."""
    return {
        f"{key}/{name}": value.detach().cpu()
        for key, m in maps.items()
        for name, value in m.named().items()
    }


def _of(key: str, kept: Tensors) -> Tensors:
    own = f"{key}/"
    return {name.removeprefix(own): v for name, v in kept.items() if name.startswith(own)}
