"""The mean training loss as part of a secure sum: nobody sees that of one site.

A site that keeps its loss to itself adds zeros, so that all sites have one layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deal_core.secure_sum.layout import SumField, finest_scale

LOSS, LOSS_WEIGHT = "loss", "loss_weight"
"""Fields: weight times loss, and the weight of those sites that say theirs."""
LARGEST_LOSS = 64.0
"""What is more counts as this; cross-entropy over 10^27 labels at random is less."""


def loss_fields(bits: int, sites: int) -> tuple[SumField, ...]:
    """Return the two fields, each on the finest grid that fits; a weight is from 0 to 1."""
    bounds = {LOSS: LARGEST_LOSS, LOSS_WEIGHT: 1.0}
    return tuple(
        SumField(n, (), most, finest_scale(most, sites, bits)) for n, most in bounds.items()
    )


def loss_values(loss: float | None, weight: float) -> dict[str, NDArray[Any]]:
    """Return what one site adds; zeros for None, and for what is no number."""
    if loss is None or not np.isfinite(loss):
        return {LOSS: np.zeros(()), LOSS_WEIGHT: np.zeros(())}
    bounded = min(max(loss, 0.0), LARGEST_LOSS)
    return {LOSS: np.asarray(weight * bounded), LOSS_WEIGHT: np.asarray(weight)}


def mean_loss(sums: Mapping[str, NDArray[Any]]) -> float | None:
    """Return the mean loss by weight; None where no site said its own, or it is not summed."""
    total = float(sums.get(LOSS_WEIGHT, 0.0))
    return float(sums[LOSS]) / total if total > 0 else None


def without_loss(sums: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return the sums of all else."""
    return {name: each for name, each in sums.items() if name not in (LOSS, LOSS_WEIGHT)}
