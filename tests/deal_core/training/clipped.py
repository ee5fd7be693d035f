"""Clipped sums as gradients of the factors, in float32, as tests compare them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deal_core.lora.attach import learning_factors
from deal_core.lora.per_example import ExampleLosses
from deal_core.privacy import dpsgd
from deal_core.privacy.dpsgd import ClippedSum

FINE = 2.0**-40
"""Of a bound: rounding that no test sees."""


def _added(clip: Callable[..., ClippedSum]) -> Callable[..., Tensor]:
    """Return a function that takes what ``clip`` takes up to its bound, adds the sum to the
    factors' gradients, and returns the norms."""

    def add(module: nn.Module, *asked: Any) -> Tensor:
        found = clip(module, *asked, asked[-1] * FINE)
        for key, factor in learning_factors(module).items():
            if key in found.total:
                own = (found.step * found.total[key].double()).float()
                factor.grad = own if factor.grad is None else factor.grad + own
        return torch.tensor(found.norms)

    return add


clipped_group_gradients = _added(dpsgd.clipped_gradients)


def clipped_gradients(
    module: nn.Module, objective: ExampleLosses, examples: Sequence[int], bound: float
) -> Tensor:
    """The same with every example by itself."""
    alone = range(max(examples, default=0) + 1)
    return clipped_group_gradients(module, objective, examples, alone, bound)
