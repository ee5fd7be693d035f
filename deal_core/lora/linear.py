"""One frozen linear layer with its LoRA factors, as a single operation.

PEFT computes the same sum with eight operations forward and as many backward, in float32.
Here the product with the frozen weight and the two thin ones share their results in place,
in the precision of the input, and nothing is computed whose gradient nobody wants.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from deal_core.lora.adapter import LoraFactors
from deal_core.lora.packing import Packing


class FrozenWeight(Protocol):
    """A weight ``W``, ``(d_out, d_in)``, that does not learn, however it is stored."""

    def times(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``rows W^T + bias``, ``(rows, d_out)``, in a tensor of its own."""

    def back(self, gradient: Tensor) -> Tensor:
        """Return ``gradient W``, ``(rows, d_in)``, in a tensor of its own."""


@dataclass(frozen=True)
class WholeWeight:
    """A weight that lies there as one tensor."""

    tensor: Tensor

    def times(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``rows W^T + bias``."""
        if bias is None:
            return rows @ self.tensor.T
        return torch.addmm(bias, rows, self.tensor.T)

    def back(self, gradient: Tensor) -> Tensor:
        """Return ``gradient W``."""
        return gradient @ self.tensor


class AdaptedLinear(torch.autograd.Function):
    """``y = x W^T + bias + s (x A^T) B^T`` for a frozen ``W``; gradients for x, A and B only.

    A factor may come once for every example, ``(examples, ...)`` of equal values (see
    :mod:`deal_core.lora.per_example`): its gradient then is that of every example. Whose a row
    of ``x`` is follows from its place, or, where texts lie in one row, from ``packing``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: FrozenWeight,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        packing: Packing | None = None,
    ) -> Tensor:
        """Return ``x W^T + scaling (x A^T) B^T + bias``, ``(..., d_out)``.

        ``x`` is ``(..., d_in)``, A ``(r, d_in)``, B ``(d_out, r)``.
        """
        rows = x.reshape(-1, x.shape[-1])
        A = _one(lora_A).to(x.dtype)
        B = (scaling * _one(lora_B)).to(x.dtype)
        hidden = rows @ A.T
        y = weight.times(rows, bias)
        y.addmm_(hidden, B.T)
        ctx.save_for_backward(rows, hidden, A, B)
        ctx.weight = weight
        ctx.scaling = scaling
        ctx.packing = packing
        ctx.copies = _copies(lora_A, x, packing), _copies(lora_B, x, packing)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The first layer's input needs no gradient, a frozen factor none either."""
        rows, hidden, A, B = ctx.saved_tensors
        wants_x, _, _, wants_A, wants_B, *_ = ctx.needs_input_grad
        gradient = gradients[0]
        g = gradient.reshape(-1, gradient.shape[-1])
        back = g @ B if wants_x or wants_A else None
        dx = dA = dB = None
        if wants_x and back is not None:
            dx = ctx.weight.back(g).addmm_(back, A).view(*gradient.shape[:-1], -1)
        of_A, of_B = ctx.copies
        if wants_A and back is not None:
            dA = _outer(back, rows, of_A, ctx.packing).float()
        if wants_B:
            dB = _outer(g, hidden, of_B, ctx.packing).float().mul_(ctx.scaling)
        return dx, None, None, dA, dB, None, None


def _one(factor: Tensor) -> Tensor:
    """Return the factor itself, where it comes once for every example."""
    return factor if factor.dim() == 2 else factor[0]


def _copies(factor: Tensor, x: Tensor, packing: Packing | None) -> int | None:
    """Return how many examples a factor comes for; None: it comes once for all.

    Raises:
        ValueError: x does not have as many rows, so nobody knows which are an example's.
    """
    if factor.dim() == 2:
        return None
    examples = factor.shape[0]
    if packing is None:
        known = x.dim() == 3 and x.shape[0] == examples
    else:
        row = (1, sum(packing.lengths))
        known = len(packing.lengths) == examples and x.dim() == 3 and x.shape[:2] == row
    if not known:
        raise ValueError("a layer mixes examples: no gradient per example")
    return examples


def _outer(left: Tensor, right: Tensor, examples: int | None, packing: Packing | None) -> Tensor:
    """Return ``left^T right``, over all rows, or over the rows of each example."""
    if examples is None:
        return left.T @ right
    if packing is not None:
        texts = (torch.split(rows, list(packing.lengths)) for rows in (left, right))
        return torch.stack([one.T @ other for one, other in zip(*texts, strict=True)])
    shape = examples, left.shape[0] // examples, -1
    return left.view(shape).transpose(1, 2) @ right.view(shape)


def adapted_forward(layer: Any, name: str, x: Tensor) -> Tensor:
    """Forward of a PEFT LoRA layer with the adapter ``name``; its scaling 0 silences it."""
    scaling = layer.scaling[name]
    if scaling == 0.0:
        silent: Tensor = layer.weights.alone(x)
        return silent
    A, B = getattr(layer, "copies", None) or (layer.lora_A[name].weight, layer.lora_B[name].weight)
    packing = getattr(layer, "packing", None)
    out: Tensor = AdaptedLinear.apply(  # type: ignore[no-untyped-call]
        x, layer.weights.selected(), layer.base_layer.bias, A, B, scaling, packing
    )
    return out


def is_quantized(layer: nn.Module) -> bool:
    """Return whether a linear layer's weight has few bits."""
    from peft.utils.integrations import get_bnb_param_type

    return bool(get_bnb_param_type(getattr(layer, "weight", None)))  # type: ignore[arg-type]


def whole_weight(layer: Any, dtype: torch.dtype) -> Tensor:
    """Return the weight of such a layer, ``(d_out, d_in)``; it lives as long as it is held."""
    from peft.utils.integrations import dequantize_bnb_weight

    return dequantize_bnb_weight(layer.weight, getattr(layer, "state", None)).to(dtype)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight of few bits, plus ``B A`` beside it where there is something.

    Attributes:
        layer: of ``bitsandbytes``.
        beside: ``A (k, d_in)`` and ``B (d_out, k)``, or None.
    """

    layer: Any
    beside: LoraFactors | None = None

    def times(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``rows (W + B A)^T + bias``."""
        bias = None if bias is None else bias.to(rows.dtype)
        y = WholeWeight(whole_weight(self.layer, rows.dtype)).times(rows, bias)
        if self.beside is not None:
            A, B = (factor.to(rows.dtype) for factor in (self.beside.A, self.beside.B))
            y.addmm_(rows @ A.T, B.T)
        return y

    def back(self, gradient: Tensor) -> Tensor:
        """Return ``gradient (W + B A)``."""
        dx = gradient @ whole_weight(self.layer, gradient.dtype)
        if self.beside is not None:
            A, B = (factor.to(gradient.dtype) for factor in (self.beside.A, self.beside.B))
            dx.addmm_(gradient @ B, A)
        return dx


class _Product(torch.autograd.Function):
    """``y = x W^T + bias``; the whole weight is not kept for the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return weight.times(x.reshape(-1, x.shape[-1]), bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        rows = ctx.weight.back(gradient.reshape(-1, gradient.shape[-1]))
        return rows.view(*gradient.shape[:-1], -1), None, None


def compute_whole(model: nn.Module) -> None:
    """Make every layer of few bits compute with its whole weight, and the input as it comes."""
    for layer in model.modules():
        if is_quantized(layer):
            layer.forward = partial(_forward, layer)


def _forward(layer: Any, x: Tensor) -> Tensor:
    return product(x, QuantizedWeight(layer), layer.bias)


def product(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """Return ``x W^T + bias``, ``(..., d_out)``, with a gradient for ``x`` alone."""
    out: Tensor = _Product.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


WeightState = Literal["pretrained", "task_start", "current"]
"""Of a frozen weight: as it was loaded; with the retained adapter; with the residual as well, and
without the part of the retained adapter that only shows the start."""


class FrozenStates(Protocol):
    """How a layer holds them."""

    def put(self, start: LoraFactors, now: LoraFactors | None) -> None:
        """Take what is added to the weight as it was loaded, scaling included; ``now`` None: what
        ``start`` is."""

    def select(self, state: WeightState) -> None:
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
        pretrained, task_start, current: in the weight's type and layout; equal ones are one.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self.pretrained: Tensor = layer.base_layer.weight.data
        self.task_start = self.current = self.pretrained

    def put(self, start: LoraFactors, now: LoraFactors | None) -> None:
        """Merge into the weight as it was loaded: nothing drifts."""
        self.task_start = self._plus(start)
        self.current = self.task_start if now is None else self._plus(now)

    def _plus(self, factors: LoraFactors) -> Tensor:
        if not factors.B.any():
            return self.pretrained
        device = self.pretrained.device
        delta = factors.B.to(device) @ factors.A.to(device)
        delta = delta.T if self._layer.fan_in_fan_out else delta
        return (self.pretrained.float() + delta).to(self.pretrained.dtype)

    def select(self, state: WeightState) -> None:
        """Put it into the base layer."""
        self._layer.base_layer.weight.data = getattr(self, state)

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
        self._beside: dict[WeightState, LoraFactors | None] = {}
        self._state: WeightState = "current"

    def put(self, start: LoraFactors, now: LoraFactors | None) -> None:
        """Keep what is not zero, where the weight is."""
        self._beside["task_start"] = self._moved(start)
        self._beside["current"] = self._beside["task_start"] if now is None else self._moved(now)

    def _moved(self, factors: LoraFactors) -> LoraFactors | None:
        device = self._layer.base_layer.weight.device
        moved = LoraFactors(factors.A.to(device), factors.B.to(device))
        return moved if factors.B.any() else None

    def select(self, state: WeightState) -> None:
        """Remember it."""
        self._state = state

    def alone(self, x: Tensor) -> Tensor:
        """Return the product with both."""
        return product(x, self.selected(), self._layer.base_layer.bias)

    def selected(self) -> QuantizedWeight:
        """Return the weight of few bits with what lies beside it."""
        return QuantizedWeight(self._layer.base_layer, self._beside.get(self._state))
