"""One p-value from several independent ones, each of them small or all of them fairly small.

One run alone refutes little: a mechanism may leak much more than usual with a small probability.
It cannot do so every time. With ``K`` repetitions, the ``j`` smallest p-values are below ``x``
with at most the binomial probability of ``j`` or more of ``K``; the most improbable ``j`` is taken,
and what the choice of ``j`` adds is counted exactly. Rises with every p-value, so it is valid
where p-values are larger than they had to be. Of one p-value it is that p-value.

Source: Berk & Jones, Z. Wahrscheinlichkeitstheorie 1979 (the statistic, one-sided).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import betainc, betaincinv

from deal_core.privacy.audit.binomial import probability


def combined(p_values: Sequence[float]) -> float:
    """Return the p-value of all; each alone is at most ``x`` with probability at most ``x``,
    whatever the others are.

    Raises:
        ValueError: there is none.
    """
    if not len(p_values):
        raise ValueError("no p-value to combine")
    count = len(p_values)
    if count == 1:
        return float(p_values[0])
    ranks = np.arange(1, count + 1)
    levels = betainc(ranks, count - ranks + 1, np.sort(p_values))
    return _any_below(betaincinv(ranks, count - ranks + 1, float(levels.min())))


def _any_below(bounds: np.ndarray) -> float:
    """Probability that some ``j``-th smallest of so many uniform numbers is below its bound."""
    count, before = len(bounds), 0.0
    fine = np.zeros(count + 1)  # of the number below the last bound, where all was well
    fine[0] = 1.0
    found, numbers = 0.0, np.arange(count + 1)
    for j, bound in enumerate(bounds.tolist()):
        share = (bound - before) / (1 - before) if before < 1 else 1.0
        more = np.maximum(numbers - numbers[: j + 1, None], 0)
        reached = numbers >= numbers[: j + 1, None]
        steps = np.where(reached, probability(more, count - numbers[: j + 1, None], share), 0.0)
        moved = fine[: j + 1] @ steps
        found += float(moved[j + 1 :].sum())
        fine = moved
        fine[j + 1 :] = 0.0
        before = bound
    return min(1.0, found)
