"""What releases spend together: privacy loss distributions, composed numerically.

One step of private training is a Gaussian mechanism on a Poisson sample. Its privacy loss is
put on a grid so that the grid's distribution dominates it ("connect the dots": each cell keeps
its mass under both neighbours' distributions, so the error is of second order), steps are
composed with one FFT, and what the grid cuts off and rounding can change is added to delta. So the
epsilon is an upper bound. Both directions of the neighbourhood, a record added and a record
removed, are composed by themselves; the larger one counts.

Sources: Doroshenko et al., "Connect the Dots", PoPETs 2022; Gopi et al., NeurIPS 2021; Mironov,
Talwar & Zhang 2019 (Renyi divergence, here for the size of the grid); Lebeda et al. 2024 (why
both directions).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfft
from scipy.special import gammaln, logsumexp, ndtr

Array = NDArray[np.float64]

FIXED_ORDERS = (2, 3, 4, 5, 6, 7, 9, 12, 17, 25, 40, 80, 200, 513)
"""Of :func:`adaptive_epsilon`: near the best for epsilons from 50 down to 0.05. Each costs a part
of delta; small ones lie closely: at low rates with little noise the next order may be far worse."""
ORDERS = np.unique(np.geomspace(2, 2048, 80).astype(int))
CUT = 1e-4
"""Part of delta that what the grid cuts off may cost at either end."""
COARSENESS = 4e-4
"""Variance that the grid may add, relative to that of the whole loss."""
SMALLEST, LARGEST = 2**13, 2**21
"""Points of a grid."""
LARGEST_LOSS = 100.0
"""No curve of a mechanism beyond this epsilon: delta is what is left there."""
ROUNDING = 2.0**-52
"""Part of delta, absolute, that the transform may be wrong by for each step that is composed."""
SMALLEST_DELTA = 9e-11
"""Below, the rounding of the transform would be a part of delta that one can see."""


@dataclass(frozen=True)
class DpEvent:
    """Steps of one Gaussian mechanism on Poisson samples.

    Attributes:
        sample_rate: probability that a record is in a step's batch; 1: always.
        noise_multiplier: standard deviation of the noise in units of the clipping bound.
        steps: how many.
    """

    sample_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        if not (0 < self.sample_rate <= 1 and self.noise_multiplier > 0 and self.steps > 0):
            raise ValueError(f"no such mechanism: {self}")


def epsilon_of(spent: Iterable[DpEvent], delta: float) -> float:
    """Return the epsilon that all of it together costs at ``delta``; 0 for nothing.

    Neighbours differ by one record that is there or not. The order plays no part, and may follow
    from what was released. What is composed may not: rates, multipliers and, of each, the most
    steps are fixed beforehand. For others: :func:`adaptive_epsilon`.

    Raises:
        ValueError: delta is not between 9e-11 and 1.
    """
    if not SMALLEST_DELTA <= delta < 1:
        raise ValueError(f"delta must be from {SMALLEST_DELTA:g} to 1, but is {delta:g}")
    return _epsilon(with_steps_added(spent), delta)


def adaptive_epsilon(spent: Iterable[DpEvent], delta: float) -> float:
    """Return an epsilon that all of it together costs at ``delta``, whatever rates, multipliers and
    numbers of steps whoever saw the earlier releases has chosen for the later ones; 0 for nothing.

    The distributions of :func:`epsilon_of` are of mechanisms that are fixed beforehand: who chooses
    among two that would fill the same budget, one with a heavier tail, can make the whole lose more
    than either. Renyi divergences of a fixed order add up for any choice (Feldman & Zrnic, NeurIPS
    2021, theorem 3.1). So there are few orders, each with its part of delta, and the best counts,
    (M67); conversion: Canonne, Kamath & Steinke, NeurIPS 2020, proposition 12.
    """
    together, own = with_steps_added(spent), delta / len(FIXED_ORDERS)
    if not together:
        return 0.0
    found = []
    for order in FIXED_ORDERS:
        divergence = sum(
            each.steps * _renyi_once(each.sample_rate, each.noise_multiplier, order)
            for each in together
        )
        tail = (math.log(1 / own) - math.log(order)) / (order - 1) + math.log1p(-1 / order)
        found.append(divergence + tail)
    return max(0.0, min(found))


def with_steps_added(spent: Iterable[DpEvent]) -> tuple[DpEvent, ...]:
    """Equal mechanisms together, in a fixed order."""
    steps: dict[tuple[float, float], int] = {}
    for each in spent:
        key = each.sample_rate, each.noise_multiplier
        steps[key] = steps.get(key, 0) + each.steps
    return tuple(DpEvent(q, sigma, n) for (q, sigma), n in sorted(steps.items()))


def renyi(spent: Sequence[DpEvent]) -> Array:
    """Return the Renyi divergence of the whole at :data:`ORDERS`, ``(orders,)``: of a batch with
    the record from one without it, which is the larger direction."""
    total = np.zeros(len(ORDERS))
    for each in spent:
        total += each.steps * _renyi(each.sample_rate, each.noise_multiplier)
    return total


@lru_cache(maxsize=1024)
def _renyi(q: float, sigma: float) -> Array:
    """Return the Rényi divergence of one step at each of :data:`ORDERS`."""
    if q == 1:
        return ORDERS / (2 * sigma**2)
    return np.array([_renyi_at(q, sigma, int(order)) for order in ORDERS])


@lru_cache(maxsize=4096)
def _renyi_once(q: float, sigma: float, order: int) -> float:
    return order / (2 * sigma**2) if q == 1 else _renyi_at(q, sigma, order)


def _renyi_at(q: float, sigma: float, order: int) -> float:
    k = np.arange(order + 1)
    ways = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
    terms = ways + (order - k) * math.log1p(-q) + k * math.log(q) + k * (k - 1) / (2 * sigma**2)
    return max(0.0, float(logsumexp(terms)) / (order - 1))


@lru_cache(maxsize=4096)
def _epsilon(spent: tuple[DpEvent, ...], delta: float) -> float:
    if not spent:
        return 0.0
    # a loss beyond the largest exponent is no number here, and its epsilon infinite
    with np.errstate(over="ignore", invalid="ignore"):
        width, points = _grid(spent, delta)
        both = [_one_direction(spent, delta, width, points, removed) for removed in (True, False)]
    # where rounding is all of delta, a bound that needs no transform is left
    return min(max(both), float(np.min(renyi(spent) + math.log(1 / delta) / (ORDERS - 1))))


def _grid(spent: tuple[DpEvent, ...], delta: float) -> tuple[float, int]:
    """Distance of the points, and their number: both tails beyond have at most ``CUT * delta``."""
    divergences = renyi(spent)
    reach = float(np.min(divergences + math.log(1 / (CUT * delta)) / (ORDERS - 1)))
    steps = sum(each.steps for each in spent)
    finest = math.sqrt(COARSENESS * 4 * max(divergences[0], 1e-12) / steps)
    points = next_fast_len(int(min(max(2 * reach / finest, SMALLEST), LARGEST)), real=True)
    return 2 * reach / (points - 2), points


def privacy_curve(spent: Iterable[DpEvent], epsilons: Array, delta: float) -> tuple[Array, Array]:
    """Return the delta of all of it together at several epsilons, not at one alone.

    Args:
        spent: all releases of one record.
        epsilons: at which, 0 or more; each is moved to a point of the grid near it, where no
            interpolation is needed.
        delta: the smallest that has to be told apart: how fine the grid is.

    Returns:
        The epsilons that were used, rising, and the delta of each, the larger of the two
        directions; an upper bound. Where the numbers leave the range of the grid, delta is 1.
    """
    together = with_steps_added(spent)
    with np.errstate(over="ignore", invalid="ignore"):
        width, points = _grid(together, delta)
        last = min(points // 2 - 1, int(LARGEST_LOSS / width))
        chosen = np.unique(np.clip(np.round(epsilons / width), 0, last).astype(int))
        deltas = np.zeros(len(chosen))
        for removed in (True, False):
            masses, lost = _composed(together, width, points, removed)
            both = _deltas(masses[: last + 1], masses[last + 1 :].sum(), width)[chosen]
            deltas = np.maximum(deltas, both - math.expm1(lost) + _rounding(together))
    return width * chosen, np.clip(np.nan_to_num(deltas, nan=1.0), 0.0, 1.0)


def _deltas(masses: Array, beyond: float, width: float) -> Array:
    """Return ``sum_t masses(t) (1 - e^(epsilon - t))+`` at every point; what is beyond counts
    whole."""
    losses = width * np.arange(len(masses))
    above = np.cumsum(masses[::-1])[::-1]
    scaled = np.cumsum((masses * np.exp(-losses))[::-1])[::-1]
    deltas: Array = above - np.exp(losses) * scaled + beyond
    return deltas


def _one_direction(
    spent: tuple[DpEvent, ...], delta: float, width: float, points: int, removed: bool
) -> float:
    high, lost = _composed(spent, width, points, removed)
    return _solve(high, width, delta - CUT * delta + math.expm1(lost) - _rounding(spent))


def _rounding(spent: Sequence[DpEvent]) -> float:
    return ROUNDING * sum(each.steps for each in spent)


def _composed(
    spent: tuple[DpEvent, ...], width: float, points: int, removed: bool
) -> tuple[Array, float]:
    """Return the masses of the whole's privacy loss at ``k * width``, ``k >= 0``, of shape
    ``(points // 2,)``, and the logarithm of what is not beyond every point."""
    transform: NDArray[Any] = np.ones(points // 2 + 1, complex)
    lost = 0.0
    for each in spent:
        masses, beyond = _losses(each, width, points, removed)
        transform *= rfft(masses) ** each.steps
        lost += each.steps * math.log1p(-min(beyond, 0.5))
    composed = np.maximum(irfft(transform, points), 0.0)
    # index k is the loss k * width, modulo the number of points
    return composed[: points // 2], lost


def _losses(each: DpEvent, width: float, points: int, removed: bool) -> tuple[Array, float]:
    """Return one step's privacy loss: masses at ``k * width`` (index modulo ``points``), and what
    is beyond every point."""
    half = (points - 2) // 2
    edges: Array = width * np.arange(-half, half + 1, dtype=np.float64)
    mixed, plain = _cell_masses(each, edges)
    low = edges[:-1]
    if removed:
        cells, other, below, beyond = mixed[1:-1], plain[1:-1], mixed[0], mixed[-1]
    else:  # the loss changes its sign, and the cells their order
        cells, other = plain[1:-1][::-1], mixed[1:-1][::-1]
        below, beyond = plain[-1], plain[0]
    upper = np.clip((cells - other * np.exp(low)) / -math.expm1(-width), 0.0, cells)
    at_edges = np.zeros(points)
    at_edges[: len(cells)] = cells - upper
    at_edges[1 : len(cells) + 1] += upper
    at_edges[0] += below
    return np.roll(at_edges, -half), float(beyond)


def _cell_masses(each: DpEvent, edges: Array) -> tuple[Array, Array]:
    """Return the mass between losses ``-inf, edges..., inf`` under the distribution with the record
    and under that without it, ``(edges + 1,)`` each."""
    q, sigma = each.sample_rate, each.noise_multiplier
    inside = np.expm1(edges) + q
    with np.errstate(divide="ignore", invalid="ignore"):
        noise = np.where(inside > 0, sigma**2 * np.log(inside / q) + 0.5, -np.inf)
    bounds = np.concatenate([[-np.inf], noise, [np.inf]])
    without = _between(bounds / sigma)
    return (1 - q) * without + q * _between((bounds - 1) / sigma), without


def _between(bounds: Array) -> Array:
    """Normal mass between neighbours, exact in both tails."""
    left, right = ndtr(bounds), ndtr(-bounds)
    masses: Array = np.where(bounds[:-1] > 0, right[:-1] - right[1:], left[1:] - left[:-1])
    return np.maximum(masses, 0.0)


def _solve(masses: Array, width: float, delta: float) -> float:
    """Return the smallest epsilon >= 0 with ``sum_t masses(t) (1 - e^(epsilon - t))+ <= delta``."""
    if delta <= 0:
        return math.inf
    losses = width * np.arange(len(masses))
    above = np.cumsum(masses[::-1])[::-1]
    scaled = np.cumsum((masses * np.exp(-losses))[::-1])[::-1]
    at_points = above - np.exp(losses) * scaled
    if at_points[0] <= delta:
        return 0.0
    k = int(np.argmax(at_points <= delta))
    if k == 0:
        return math.inf
    return float(math.log((above[k] - delta) / scaled[k]))
