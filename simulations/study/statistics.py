"""Means with intervals, and paired differences: Student's t, 95 %.

Source: docs/method.md (M38).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` values.

    Attributes:
        half_width: of the 95 % interval; None with one value, or where all are equal, which say
            nothing of spread.
        p_value: two-sided, of a true mean of 0; None likewise.
    """

    mean: float
    half_width: float | None
    p_value: float | None
    n: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, interval and p value of at least one value."""
    n, mean = len(values), fmean(values)
    if n == 1:
        return Estimate(mean, None, None, n)
    error = stdev(values) / math.sqrt(n)
    # Rounding alone must not make equal values differ.
    if error <= 1e-12 * max(abs(value) for value in values):
        return Estimate(mean, None, None, n)
    half_width = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
    return Estimate(mean, half_width, float(2 * stats.t.sf(abs(mean) / error, n - 1)), n)


def paired_difference(
    ours: Mapping[Hashable, float], theirs: Mapping[Hashable, float]
) -> Estimate | None:
    """Of ``ours - theirs`` over the keys (seed, order) that both have; None: they share none."""
    common = [key for key in ours if key in theirs]
    return estimate([ours[key] - theirs[key] for key in common]) if common else None
