"""One frozen linear layer with its LoRA factors, as a single operation.

PEFT computes the same sum with eight operations forward and as many backward, in float32.
Here the product with the frozen weight and the two thin ones share their results in place,
in the precision of the input, and nothing is computed whose gradient nobody wants.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deal_core.lora.adapter import LoraFactors


class AdaptedLinear(torch.autograd.Function):
    """``y = x W^T + bias + s (x A^T) B^T`` for a frozen ``W``; gradients for x, A and B only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Callable[[], Tensor],
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
    ) -> Tensor:
        """Return ``x W^T + scaling (x A^T) B^T + bias``, ``(..., d_out)``.

        ``x`` is ``(..., d_in)``, A ``(r, d_in)``, B ``(d_out, r)``; ``weight`` makes or finds
        ``W``, ``(d_out, d_in)``, which is not kept for the way back.
        """
        rows = x.reshape(-1, x.shape[-1])
        A, B = lora_A.to(x.dtype), (scaling * lora_B).to(x.dtype)
        hidden = rows @ A.T
        W = weight().T
        y = rows @ W if bias is None else torch.addmm(bias.to(x.dtype), rows, W)
        y.addmm_(hidden, B.T)
        ctx.save_for_backward(rows, hidden, A, B)
        ctx.weight = weight
        ctx.scaling = scaling
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The first layer's input needs no gradient, a frozen factor none either."""
        rows, hidden, A, B = ctx.saved_tensors
        wants_x, _, _, wants_A, wants_B, _ = ctx.needs_input_grad
        gradient = gradients[0]
        g = gradient.reshape(-1, gradient.shape[-1])
        back = g @ B if wants_x or wants_A else None
        dx = dA = dB = None
        if wants_x and back is not None:
            dx = (g @ ctx.weight()).addmm_(back, A).view(*gradient.shape[:-1], -1)
        if wants_A and back is not None:
            dA = (back.T @ rows).float()
        if wants_B:
            dB = (g.T @ hidden).float().mul_(ctx.scaling)
        return dx, None, None, dA, dB, None


def adapted(
    x: Tensor, weight: Callable[[], Tensor], bias: Tensor | None, factors: LoraFactors, s: float
) -> Tensor:
    """Return :class:`AdaptedLinear` of ``x``, with scaling ``s``."""
    apply: Callable[..., Tensor] = AdaptedLinear.apply
    return apply(x, weight, bias, factors.A, factors.B, s)


def adapted_forward(layer: Any, name: str, x: Tensor) -> Tensor:
    """Forward of a PEFT LoRA layer with the adapter ``name``; its scaling 0 silences it."""
    current = LoraFactors(layer.lora_A[name].weight, layer.lora_B[name].weight)
    out: Tensor = layer.weights.forward(x, current, layer.scaling[name])
    return out


def is_quantized(layer: nn.Module) -> bool:
    """Return whether a linear layer's weight has few bits."""
    from peft.utils.integrations import get_bnb_param_type

    return bool(get_bnb_param_type(getattr(layer, "weight", None)))  # type: ignore[arg-type]


def whole_weight(layer: Any, dtype: torch.dtype) -> Tensor:
    """Return the weight of such a layer, ``(d_out, d_in)``; it lives as long as it is held."""
    from peft.utils.integrations import dequantize_bnb_weight

    return dequantize_bnb_weight(layer.weight, getattr(layer, "state", None)).to(dtype)


def compute_whole(model: nn.Module) -> None:
    """Make every layer of few bits compute with its whole weight, and the input as it comes."""
    for layer in model.modules():
        if is_quantized(layer):
            layer.forward = partial(_whole_forward, layer)


def _whole_forward(layer: Any, x: Tensor) -> Tensor:
    nothing = LoraFactors(x.new_zeros(0, layer.in_features), x.new_zeros(layer.out_features, 0))
    return adapted(x, partial(whole_weight, layer, x.dtype), layer.bias, nothing, 0.0)


WeightState = Literal["pretrained", "task_start", "current"]
"""Of a frozen weight: as it was loaded; with the retained adapter; with the residual as well, and
without the part of the retained adapter that only shows the start."""


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
        """Merge into the weight as it was loaded, so that nothing drifts: what the start of the
        task has, and what there is ``now``, scaling included; None: the same."""
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
        """Compute with this state from now on."""
        self._layer.base_layer.weight.data = getattr(self, state)

    def forward(self, x: Tensor, current: LoraFactors, scaling: float) -> Tensor:
        """Return what the layer makes of ``x``, ``(..., d_in)``; Conv1D stores its transpose."""
        base = self._layer.base_layer
        if scaling == 0.0:
            out: Tensor = base(x)
            return out
        weight = base.weight.T if self._layer.fan_in_fan_out else base.weight
        return adapted(x, lambda: weight, base.bias, current, scaling)


class QuantizedStates:
    """One weight of few bits, to which nothing can be added; what is merged elsewhere is multiplied
    in beside it. As :class:`MergedStates`."""

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
        """Compute with this state from now on."""
        self._state = state

    def forward(self, x: Tensor, current: LoraFactors, scaling: float) -> Tensor:
        """Return what the layer makes of ``x``."""
        base, beside = self._layer.base_layer, self._beside.get(self._state)
        out = adapted(x, partial(whole_weight, base, x.dtype), base.bias, current, scaling)
        if beside is None:
            return out
        return out + (x @ beside.A.to(x.dtype).T) @ beside.B.to(x.dtype).T
