"""One frozen linear layer with its LoRA factors, as a single operation.

PEFT computes the same sum with eight operations forward and as many backward, in float32.
Here the product with the frozen weight and the two thin ones share their results in place,
in the precision of the frozen weight, and nothing is computed whose gradient nobody wants.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class AdaptedLinear(torch.autograd.Function):
    """``y = x W^T + bias + s (x A^T) B^T`` for a frozen ``W``; gradients for x, A and B only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
    ) -> Tensor:
        """x ``(..., d_in)``, weight ``(d_out, d_in)``, A ``(r, d_in)``, B ``(d_out, r)``."""
        rows = x.reshape(-1, x.shape[-1])
        A = lora_A.to(x.dtype)
        B = (scaling * lora_B).to(x.dtype)
        hidden = rows @ A.T
        y = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
        y.addmm_(hidden, B.T)
        ctx.save_for_backward(rows, hidden, weight, A, B)
        ctx.scaling = scaling
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The first layer's input needs no gradient, a frozen factor none either."""
        rows, hidden, weight, A, B = ctx.saved_tensors
        wants_x, _, _, wants_A, wants_B, _ = ctx.needs_input_grad
        gradient = gradients[0]
        g = gradient.reshape(-1, gradient.shape[-1])
        back = g @ B if wants_x or wants_A else None
        dx = dA = dB = None
        if wants_x and back is not None:
            dx = (g @ weight).addmm_(back, A).view(*gradient.shape[:-1], -1)
        if wants_A and back is not None:
            dA = (back.T @ rows).float()
        if wants_B:
            dB = (g.T @ hidden).float().mul_(ctx.scaling)
        return dx, None, None, dA, dB, None


def frozen_weight(layer: Any) -> Tensor:
    """The layer's frozen weight as ``(d_out, d_in)``; Conv1D stores its transpose."""
    weight: Tensor = layer.base_layer.weight
    return weight.T if layer.fan_in_fan_out else weight


def adapted_forward(layer: Any, name: str, x: Tensor) -> Tensor:
    """Forward of a PEFT LoRA layer with the adapter ``name``; its scaling 0 silences it."""
    scaling = layer.scaling[name]
    if scaling == 0.0:
        silent: Tensor = layer.base_layer(x)
        return silent
    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    out: Tensor = AdaptedLinear.apply(  # type: ignore[no-untyped-call]
        x, frozen_weight(layer), layer.base_layer.bias, A, B, scaling
    )
    return out
