"""The trade-off curve of a claim: how well one record may be told from none at all.

For a test of "the record was not there" with false alarms at rate ``y``, at most
``fbar(y) = min over epsilon of delta(epsilon) + e^epsilon y`` of the cases where it was there are
found, epsilon below zero included. All pairs ``(epsilon, delta(epsilon))`` that the accountant
has for what a ledger holds go into it, and not the one at which a budget was set.

Source: Dong, Roth & Su, "Gaussian differential privacy", JRSS B 2022, proposition 6 (there
``f(y) = 1 - fbar(y)``).
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
