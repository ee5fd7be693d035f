"""The trade-off curve of a claim, and how improbable right guesses are under it.

For a test of "the record was not there" with false alarms at rate ``y``, at most
``fbar(y) = min over epsilon of delta(epsilon) + e^epsilon y`` of the cases where it was there are
found, epsilon below zero included. All pairs ``(epsilon, delta(epsilon))`` that the accountant
has for what a ledger holds go into it, and not the one at which a budget was set.

Of ``m`` canaries, each there or not by a fair coin of its own, ``r`` are guessed, and ``C`` of the
guesses are right; ``p_i = P(C = i)``. Turn one coin: what was a right guess becomes a wrong one,
and no more right guesses are found among those that the other ``C - 1`` leave than the curve
allows. Summed over all coins that gives, for every ``t``,

    sum_{i >= t} i/m p_i  <=  fbar( sum_{i >= t-1} (r - i)/m p_i ).

The largest ``P(C >= c)`` that all of these allow is the p-value. It has all its mass at ``c``
(more right guesses would only ask for more); below ``c`` come, from ``t = c`` down, the smallest
masses that the inequalities need; where these pass 1, so much is impossible.

Sources: Dong, Roth & Su, "Gaussian differential privacy", JRSS B 2022, proposition 6 (there
``f(y) = 1 - fbar(y)``); Mahloujifar, Melis & Chaudhuri, "Auditing f-differential privacy in one
run", ICML 2025, theorem 9 and algorithm 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deal_core.privacy.accountant import DpEvent, privacy_curve

Array = NDArray[np.float64]

FINEST = 1e-5
"""A delta that must be told from zero: canaries by the thousand cannot see a smaller one."""
EPSILONS = np.concatenate([[0.0], np.geomspace(1e-3, 40.0, 400)])

CANDIDATES = 32
"""Probabilities that are tried together."""
ROUNDS = 2
"""How often they close in: what is returned is at most 32^-2 above the truth, and never below."""


@dataclass(frozen=True)
class TradeOff:
    """The curve, by its inverse, which is convex and made of straight pieces.

    Attributes:
        found: rates of true finds at the ends of the pieces, rising from 0 to 1.
        false_alarms: the least rate of false alarms that goes with each.
    """

    found: Array
    false_alarms: Array

    def least_false_alarms(self, found: Array) -> Array:
        """Return the least rate of false alarms of a test that finds so much; beyond 1: beyond 1,
        so that what is impossible stays so."""
        inside = np.interp(found, self.found, self.false_alarms)
        return np.where(found > 1, np.maximum(found, inside), inside)


def trade_off(spent: Iterable[DpEvent]) -> TradeOff:
    """Return the curve of everything that was spent together, in either direction (a record added,
    a record removed)."""
    return trade_off_of(*privacy_curve(spent, EPSILONS, FINEST))


def trade_off_of(epsilons: Array, deltas: Array) -> TradeOff:
    """Return the curve of a mechanism that is ``(epsilon, delta)``-private for every pair.

    Args:
        epsilons: 0 or more, ``(n,)``.
        deltas: of each, ``(n,)``.
    """
    shrink = np.exp(-epsilons)
    # found <= delta + e^eps false, and the same with finds and false alarms in each other's place
    slopes = np.concatenate([shrink, 1 / shrink])
    offsets = np.concatenate([-shrink * deltas, (1 - deltas) - 1 / shrink])
    corners = _upper_envelope(slopes, offsets)
    return TradeOff(np.array([x for x, _ in corners]), np.array([y for _, y in corners]))


def _upper_envelope(slopes: Array, offsets: Array) -> list[tuple[float, float]]:
    """Corners, from 0 to 1, of the largest of straight lines and zero."""
    order = np.lexsort((offsets, slopes))
    lines: list[tuple[float, float]] = [(0.0, 0.0)]
    for slope, offset in zip(slopes[order].tolist(), offsets[order].tolist(), strict=True):
        if lines[-1][0] == slope:
            if lines[-1][1] >= offset:
                continue
            lines.pop()
        while len(lines) > 1 and _cross(lines[-2], (slope, offset)) <= _cross(lines[-2], lines[-1]):
            lines.pop()
        lines.append((slope, offset))
    inner = [x for x in map(_cross, lines, lines[1:]) if 0 < x < 1]
    ends = [0.0, *inner, 1.0]
    return [(x, max(slope * x + offset for slope, offset in lines)) for x in ends]


def _cross(left: tuple[float, float], right: tuple[float, float]) -> float:
    return (left[1] - right[1]) / (right[0] - left[0])


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


def _possible(m: int, r: int, c: int, tails: Array, curve: TradeOff) -> NDArray[np.bool_]:
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
