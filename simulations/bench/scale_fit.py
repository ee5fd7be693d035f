"""Points of a measured curve, and the power that fits them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """Seconds of a round (median, smallest, largest; the first round of a run aside), seconds
    from the start of the process to its first round, and peak memory of the run."""

    x: float
    seconds: float
    least: float
    most: float
    start_seconds: float
    peak_bytes: int


def exponent(points: Sequence[Point]) -> float:
    """Return the slope of log seconds over log x, least squares: 0 is constant, 1 linear. NaN
    where there are no two different x."""
    return power([point.x for point in points], [point.seconds for point in points])


def power(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return the exponent ``p`` of the curve ``y = c x^p`` that fits best, least squares of the
    logarithms; NaN where there are no two different x."""
    if len(set(xs)) < 2:
        return math.nan
    logs = [math.log(x) for x in xs], [math.log(y) for y in ys]
    return statistics.linear_regression(*logs).slope
