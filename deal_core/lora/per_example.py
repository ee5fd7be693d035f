"""Gradients of single examples, and sums of their squares.

Each is computed in a pass of its own: who else is in a pass decides how its numbers are rounded,
and a model can be made so that this is what it answers with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from deal_core.lora.attach import learning_factors

Gradient = Mapping[str, Tensor]
"""Name of what learns to its gradient; a name may be missing: zero."""


class ExampleLosses(Protocol):
    """What is differentiated: an objective, as far as it reads data."""

    def example_losses(self, batch: Sequence[int]) -> Tensor:
        """Return losses of these examples (positions in the client's data), ``(batch,)``, each
        independent of its batch-mates."""


def example_gradient(module: nn.Module, objective: ExampleLosses, example: int) -> Gradient:
    """Return the gradient of one example: all of its loss, whichever way that reads a factor.
    Gradients of the factors stay as they are."""
    factors = learning_factors(module)
    loss = objective.example_losses([example]).sum()
    found = torch.autograd.grad(loss, list(factors.values()), allow_unused=True)
    return {key: own for key, own in zip(factors, found, strict=True) if own is not None}


def gradient_alone(module: nn.Module, objective: ExampleLosses, example: int) -> Gradient:
    """Return :func:`example_gradient`; empty where it cannot be computed, so that what an example
    does to the arithmetic stays its own."""
    try:
        return example_gradient(module, objective, example)
    except Exception:
        return {}


def squared_gradients(
    module: nn.Module, objective: ExampleLosses, examples: Iterable[int]
) -> dict[str, Tensor]:
    """Return ``sum_i g_i^2``, entry by entry, of every factor that learns; nothing is clipped."""
    sums = {key: torch.zeros_like(factor) for key, factor in learning_factors(module).items()}
    for example in examples:
        for key, gradient in example_gradient(module, objective, example).items():
            sums[key] += gradient.square()
    return sums
