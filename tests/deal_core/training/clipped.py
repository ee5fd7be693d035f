"""Clipped sums as gradients of the factors, in float32, as tests compare them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deal_core.lora.learnt import learning_by_key
from deal_core.training import per_group, per_sample
from deal_core.training.clipped_sum import ClippedSum
from deal_core.training.objective import Objective

FINE = 2.0**-40
"""Of a bound: rounding that no test sees."""


def clipped_gradients(
    module: nn.Module, objective: Objective, examples: Sequence[int], bound: float
) -> Tensor:
    """Add the clipped sum to the factors' gradients; return the norms, ``(examples,)``."""
    return _added(
        module, per_sample.clipped_gradients(module, objective, examples, bound, bound * FINE)
    )


def clipped_group_gradients(
    module: nn.Module,
    objective: Objective,
    examples: Sequence[int],
    groups: Sequence[int],
    bound: float,
) -> Tensor:
    """The same of groups; norms are ``(groups in the batch,)``."""
    found = per_group.clipped_group_gradients(
        module, objective, examples, groups, bound, bound * FINE
    )
    return _added(module, found)


def _added(module: nn.Module, found: ClippedSum) -> Tensor:
    for key, factor in learning_by_key(module).items():
        if key in found.total:
            own = (found.step * found.total[key].double()).float()
            factor.grad = own if factor.grad is None else factor.grad + own
    return torch.tensor(found.norms)
