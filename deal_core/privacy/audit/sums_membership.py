"""Membership inference on sums over records: who is in a class sum.

The attacker knows the label, how many records are in the sum, how much noise is in it, and other
records that are in no sum; the score is the likelihood ratio of two Gaussians, with the record in
the sum and without.

Source: Carlini et al., S&P 2022 (likelihood ratios); Sankararaman et al., Nature Genetics 2009.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deal_core.privacy.audit.membership import Scores

Rows = NDArray[np.float64]
TINY = 1e-6
"""Variance of a sum without noise at least, as a share of the mean variance."""


@dataclass(frozen=True)
class Known:
    """What the attacker knows of a label's records.

    Attributes:
        mean: ``(size,)``.
        covariance: within the label, ``(size, size)``.
        records: from so many the mean is estimated.
    """

    mean: Rows
    covariance: Rows
    records: int


def known_of(own: Rows, others: Rows) -> Known:
    """Return what follows from records that are in no sum; the more of them there are for each
    direction, the more the label's own covariance counts.

    Args:
        own: of the label, two or more, ``(records, size)``.
        others: covariance within other labels, ``(size, size)``.
    """
    weight = len(own) / (len(own) + own.shape[1])
    covariance = weight * np.cov(own, rowvar=False) + (1 - weight) * others
    return Known(own.mean(axis=0), covariance, len(own))


def as_added(vectors: Rows, bound: float, count_weight: float) -> Rows:
    """Return what each record adds to a class sum, its count left out: clipped with that."""
    lengths = np.sqrt(np.square(vectors).sum(axis=1, keepdims=True) + count_weight**2)
    clipped: Rows = vectors * (bound / np.maximum(lengths, bound))
    return clipped


def sum_scores(records: Rows, total: Rows, members: int, deviation: float, known: Known) -> Scores:
    """Score records by the likelihood ratio of a class sum.

    Args:
        records: as they are added, ``(records, size)``.
        total: the sum, ``(size,)``.
        members: records in it.
        deviation: of its noise in each entry.
        known: what the attacker knows; its mean is uncertain, too.

    Returns:
        For each record the logarithm of how much likelier the sum is with it than without, but for
        a constant.
    """
    spread = (members + members**2 / known.records) * known.covariance
    noise = max(deviation**2, TINY * np.trace(spread) / len(spread))
    away = records - known.mean
    weighted = np.linalg.solve(spread + noise * np.eye(len(spread)), away.T).T
    own = (weighted * away).sum(axis=1)
    scores: Scores = weighted @ (total - members * known.mean) - 0.5 * own
    return scores
