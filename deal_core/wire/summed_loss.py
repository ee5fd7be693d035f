"""The mean training loss as part of a secure sum: known where every site of the sum lets its own
in, and else not at all.

A sum over those alone who say theirs would be another sum than that of the updates: the difference
of the two is of those who do not. So a site that keeps its loss fills both fields with words drawn
from the whole ring: the one covers what all others have added, the other says that somebody keeps
its own, and not how many do. A sum of such words is 0, and the loss a word of no meaning, once in
2^32 rounds of updates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deal_core.secure_sum.layout import COVERED, WEIGHT, SumField, finest_scale

LOSS, LOSS_KEPT = "loss", "loss_kept"
"""Fields: weight times loss, and 0 for a site that says its own."""
LARGEST_LOSS = 64.0
"""What is more counts as this; cross-entropy over 10^27 labels at random is less."""


def loss_fields(bits: int, sites: int) -> tuple[SumField, ...]:
    """Return the two fields; the first on the finest grid that fits, with weights from 0 to 1."""
    scale = finest_scale(LARGEST_LOSS, sites, bits)
    return (
        SumField(LOSS, (), LARGEST_LOSS, scale, coverable=True),
        SumField(LOSS_KEPT, (), 1.0, coverable=True),
    )


def loss_values(loss: float | None, weight: float) -> dict[str, NDArray[Any] | None]:
    """Return what one site adds; covered fields for None, and for what is no number."""
    if loss is None or not np.isfinite(loss):
        return {LOSS: COVERED, LOSS_KEPT: COVERED}
    told = np.asarray(weight * min(max(loss, 0.0), LARGEST_LOSS))
    return {LOSS: told, LOSS_KEPT: np.asarray(0)}


def mean_loss(sums: Mapping[str, NDArray[Any]]) -> float | None:
    """Return the mean loss by weight; None where a site keeps its own, where losses are not
    summed, and for what no losses can add up to."""
    if LOSS not in sums or sums[LOSS_KEPT] != 0 or sums[WEIGHT] <= 0:
        return None
    mean = float(sums[LOSS] / sums[WEIGHT])
    return mean if 0 <= mean <= LARGEST_LOSS else None


def without_loss(sums: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return the sums of all else."""
    return {name: each for name, each in sums.items() if name not in (LOSS, LOSS_KEPT)}
