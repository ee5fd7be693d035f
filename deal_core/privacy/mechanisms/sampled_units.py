"""A Poisson sample of what is protected, records or groups, and its clipped gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from deal_core.models.interface import Encoded
from deal_core.privacy.interface import RecordId
from deal_core.privacy.mechanisms.groups import Groups
from deal_core.privacy.mechanisms.guards import UnsafeModel, require_plain_lora, require_sampled
from deal_core.privacy.mechanisms.noise import NoiseSource
from deal_core.training.clipped_sum import ClippedSum
from deal_core.training.objective import Objective
from deal_core.training.per_group import clipped_group_gradients
from deal_core.training.per_sample import clipped_gradients

BELOW = 1 - 1e-9
"""What products in float64 may be off by."""


def drawn_batch(
    data: Sequence[Encoded], groups: Groups | None, sample_rate: float, noise: NoiseSource
) -> list[int]:
    """Return positions of a Poisson sample; it may be empty. A group comes whole.

    Args:
        data: the examples.
        groups: of the examples; None: each is protected by itself.
        sample_rate: probability of an example, or group.
        noise: of the draw.
    """
    units = len(data) if groups is None else len(groups)
    taken = noise.uniform(units) <= sample_rate
    drawn: list[int] = taken.nonzero().flatten().tolist()
    return drawn if groups is None else groups.batch(drawn)


def require_drawn(
    batch: Sequence[int],
    record_ids: Sequence[RecordId],
    groups: Groups | None,
    sample_rate: float,
) -> None:
    """Check that a batch can be a sample of the rate that is charged.

    Raises:
        UnsafeModel: a record twice, a group in part, or more than such a sample ever has.
    """
    if groups is None:
        require_sampled(batch, record_ids, sample_rate)
    else:
        groups.require_sampled(batch, sample_rate)


def rehearse_clipping(module: nn.Module, objective: Objective, probes: int, bound: float) -> None:
    """Take a clipped gradient over so many constant texts, and drop it.

    Raises:
        UnsafeModel: something learns whose gradient per example cannot be had.
        ValueError: a loss reads a factor itself, or no gradient is finite.
    """
    factors = require_plain_lora(module)
    total = clipped_gradients(module, objective, range(probes), bound, bound)
    for factor in factors:
        factor.grad = None
    if not all(map(math.isfinite, total.norms)):
        raise UnsafeModel("the model has no gradient on constant texts")


def clipped_total(
    module: nn.Module,
    objective: Objective,
    groups: Groups | None,
    batch: Sequence[int],
    bound: float,
    step: float,
) -> ClippedSum:
    """Return the sum of clipped gradients, of groups the clipped means of theirs.

    Args:
        module: holds the adapter.
        objective: whose losses of single examples are differentiated.
        groups: of the examples; None: each by itself.
        batch: positions in the data.
        bound: of each gradient.
        step: of the grid.
    """
    if groups is None:
        return clipped_gradients(module, objective, batch, bound, step)
    return clipped_group_gradients(module, objective, batch, groups.numbers, bound, step)


def clipping_bound(max_grad_norm: float, entries: int, bits: int) -> float:
    """Return the bound of a gradient over so many entries at which a sum that is rounded to a grid
    of ``2^-bits`` changes by ``max_grad_norm`` at most, where a record is added or removed.

    Raises:
        UnsafeModel: rounding takes all of it.

    Source: docs/method.md (M66): rounding moves an entry by half a step at most.
    """
    bound = max_grad_norm * (BELOW - math.sqrt(entries) / 2 ** (bits + 1))
    if bound <= 0:
        raise UnsafeModel(f"{entries} entries are too many for a grid of 2^-{bits}")
    return bound
