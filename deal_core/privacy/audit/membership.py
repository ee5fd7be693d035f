"""Membership inference: how well a score tells training records from records that were not there.

Source: Carlini et al., "Membership inference attacks from first principles", S&P 2022 (why the
true positive rate at a small false positive rate counts, and not the mean alone).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

Scores = NDArray[np.float64]
FALSE_POSITIVES = 0.01
RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Membership:
    """What the attack can do.

    Attributes:
        auc: probability that a member scores above a non-member (ties half); 0.5: nothing.
        true_positives: share of the members found where at most 1 % of the non-members are taken
            for members; None below a hundred non-members, whose 1 % nobody knows.
        members, others: how many.
    """

    auc: Interval
    true_positives: Interval | None
    members: int
    others: int


def membership(
    members: Scores, others: Scores, seed: int, resamples: int = RESAMPLES
) -> Membership:
    """Judge scores that are higher where a record looks as if it had been trained on.

    Args:
        members: ``(n,)``, of records that were trained on.
        others: ``(k,)``, of records that were not there.
        seed: of the resampling, of members and of others by themselves.
        resamples: behind an interval.

    Returns:
        How well the scores tell members from others, with intervals.

    Raises:
        ValueError: nothing to compare.
    """
    if not (len(members) and len(others)):
        raise ValueError(f"{len(members)} members and {len(others)} other records")
    rng = np.random.default_rng(seed)
    draws = [
        (rng.choice(members, len(members)), rng.choice(others, len(others)))
        for _ in range(resamples)
    ]
    found = None
    if len(others) >= 1 / FALSE_POSITIVES:
        rates = [true_positive_rate(*draw) for draw in draws]
        found = _interval(true_positive_rate(members, others), rates)
    areas = [area(*draw) for draw in draws]
    return Membership(_interval(area(members, others), areas), found, len(members), len(others))


def area(members: Scores, others: Scores) -> float:
    """Area under the ROC curve."""
    n, k = len(members), len(others)
    ranks = rankdata(np.concatenate([members, others]))
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * k))


def true_positive_rate(
    members: Scores, others: Scores, false_positives: float = FALSE_POSITIVES
) -> float:
    """Share of members above a threshold that at most so many of the others pass."""
    allowed = int(false_positives * len(others))
    threshold = np.sort(others)[len(others) - allowed - 1]
    return float((members > threshold).mean())


def _interval(value: float, resampled: list[float]) -> Interval:
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))
