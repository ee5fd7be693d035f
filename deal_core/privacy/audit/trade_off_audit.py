"""How improbable right guesses are under a whole trade-off curve, and not one (epsilon, delta).

Of ``m`` canaries, each there or not by a fair coin of its own, ``r`` are guessed, and ``C`` of the
guesses are right; ``p_i = P(C = i)``. Turn one coin: what was a right guess becomes a wrong one,
and no more right guesses are found among those that the other ``C - 1`` leave than the curve
allows. Summed over all coins that gives, for every ``t``, with ``fbar`` of
:mod:`deal_core.privacy.audit.tradeoff`,

    sum_{i >= t} i/m p_i  <=  fbar( sum_{i >= t-1} (r - i)/m p_i ).

The largest ``P(C >= c)`` that all of these allow is the p-value. It has all its mass at ``c``
(more right guesses would only ask for more); below ``c`` come, from ``t = c`` down, the smallest
masses that the inequalities need; where these pass 1, so much is impossible.

Source: Mahloujifar, Melis & Chaudhuri, "Auditing f-differential privacy in one run", ICML 2025,
theorem 9 and algorithm 3.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deal_core.privacy.audit.tradeoff import TradeOff

CANDIDATES = 32
"""Probabilities that are tried together."""
ROUNDS = 2
"""How often they close in: what is returned is at most 32^-2 above the truth, and never below."""


def p_value(canaries: int, guesses: int, correct: int, curve: TradeOff) -> float:
    """Return the probability, at most, of ``correct`` or more right guesses under the curve.

    Args:
        canaries: each in the data by a fair coin of its own.
        guesses: made on some of them, from what was released alone.
        correct: of the guesses.
        curve: of the claim that is put to the test.

    Raises:
        ValueError: numbers that do not fit together.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"{correct} right of {guesses} guesses about {canaries} canaries")
    if correct == 0:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(ROUNDS):
        tried = np.linspace(low, high, CANDIDATES + 1)[1:]
        possible = _possible(canaries, guesses, correct, tried, curve)
        if possible.all():
            return high
        first = int(np.argmin(possible))
        low, high = (low if first == 0 else float(tried[first - 1])), float(tried[first])
    return high


def _possible(
    m: int, r: int, c: int, tails: NDArray[np.float64], curve: TradeOff
) -> NDArray[np.bool_]:
    """Which values of ``P(C >= c)`` the inequalities allow."""
    right, wrong = tails * c / m, tails * (r - c) / m
    whole = r / m * (1 + 1e-12)
    possible = right + wrong <= whole
    for i in range(c - 1, -1, -1):
        # the inequality for t = i + 1 may need mass at i
        missing = np.maximum(curve.least_false_alarms(right) - wrong, 0.0)
        if not missing.any():
            break
        # beyond 1 it is impossible already: no need to know by how much
        missing = np.minimum(missing, 1.0)
        wrong = np.minimum(wrong + missing, 2.0)
        right = np.minimum(right + missing * i / (r - i), 2.0)
        possible &= right + wrong <= whole
        if not possible.any():
            break
    return possible
