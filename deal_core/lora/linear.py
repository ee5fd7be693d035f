"""One frozen linear layer with its LoRA factors, as a single operation.

PEFT computes the same sum with eight operations forward and as many backward, in float32.
Here the product with the frozen weight and the two thin ones share their results in place,
in the precision of the input, and nothing is computed whose gradient nobody wants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

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
