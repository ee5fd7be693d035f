"""Frozen weights of 8 or 4 bits, made whole for one product at a time.

Source: QLoRA, arXiv 2305.14314; the bits are those of the package ``bitsandbytes``. Activations
are never rounded to 8 bits, as LLM.int8() would: what it makes of a text depends on the texts
beside it, which neither an evaluation nor a guarantee for single records can stand.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deal_core.lora.adapter import LoraFactors
from deal_core.lora.linear import WholeWeight


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
