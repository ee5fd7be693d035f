"""The three frozen states of an adapted layer: what its current adapter is added to."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from torch import Tensor

from deal_core.lora.adapter import LoraFactors
from deal_core.lora.linear import FrozenWeight, WholeWeight
from deal_core.lora.quantized import QuantizedWeight, is_quantized, product

Moment = Literal["base", "start", "now"]
"""``base``: as it was loaded; ``start``: with the retained adapter, the model at the start of the
task; ``now``: with the residual as well, and without the part of the retained adapter that only
shows the start."""


class FrozenStates(Protocol):
    """How a layer holds them."""

    def put(self, start: LoraFactors, now: LoraFactors | None) -> None:
        """Take what is added to the weight as it was loaded, scaling included; ``now`` None: what
        ``start`` is."""

    def select(self, moment: Moment) -> None:
        """Compute with this state from now on."""

    def selected(self) -> FrozenWeight:
        """Return the weight of the state that is selected."""

    def alone(self, x: Tensor) -> Tensor:
        """Return what the layer makes of ``x``, ``(..., d_in)``, without a current adapter."""


def frozen_states(layer: Any) -> FrozenStates:
    """Return those of a PEFT layer, as its base layer was loaded."""
    return QuantizedStates(layer) if is_quantized(layer.base_layer) else MergedStates(layer)


class MergedStates:
    """Three whole weights, in which all is merged once instead of being multiplied in every pass.

    Attributes:
        base, start, now: in the weight's type and layout; equal ones share their memory.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self.base: Tensor = layer.base_layer.weight.data
        self.start = self.now = self.base

    def put(self, start: LoraFactors, now: LoraFactors | None) -> None:
        """Merge into the weight as it was loaded: nothing drifts."""
        self.start = self._plus(start)
        self.now = self.start if now is None else self._plus(now)

    def _plus(self, factors: LoraFactors) -> Tensor:
        if not factors.B.any():
            return self.base
        device = self.base.device
        delta = factors.B.to(device) @ factors.A.to(device)
        delta = delta.T if self._layer.fan_in_fan_out else delta
        return (self.base.float() + delta).to(self.base.dtype)

    def select(self, moment: Moment) -> None:
        """Put it into the base layer."""
        self._layer.base_layer.weight.data = getattr(self, moment)

    def selected(self) -> FrozenWeight:
        """Return the base layer's weight as ``(d_out, d_in)``; Conv1D stores its transpose."""
        weight: Tensor = self._layer.base_layer.weight
        return WholeWeight(weight.T if self._layer.fan_in_fan_out else weight)

    def alone(self, x: Tensor) -> Tensor:
        """Return what the base layer makes of it."""
        out: Tensor = self._layer.base_layer(x)
        return out


class QuantizedStates:
    """One weight of few bits, to which nothing can be added; what is merged elsewhere is multiplied
    in beside it."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._beside: dict[Moment, LoraFactors | None] = dict.fromkeys(("base", "start", "now"))
        self._moment: Moment = "now"

    def put(self, start: LoraFactors, now: LoraFactors | None) -> None:
        """Keep what is not zero, where the weight is."""
        self._beside["start"] = self._moved(start)
        self._beside["now"] = self._beside["start"] if now is None else self._moved(now)

    def _moved(self, factors: LoraFactors) -> LoraFactors | None:
        device = self._layer.base_layer.weight.device
        moved = LoraFactors(factors.A.to(device), factors.B.to(device))
        return moved if factors.B.any() else None

    def select(self, moment: Moment) -> None:
        """Remember it."""
        self._moment = moment

    def alone(self, x: Tensor) -> Tensor:
        """Return the product with both."""
        return product(x, self.selected(), self._layer.base_layer.bias)

    def selected(self) -> QuantizedWeight:
        """Return the weight of few bits with what lies beside it."""
        return QuantizedWeight(self._layer.base_layer, self._beside[self._moment])
