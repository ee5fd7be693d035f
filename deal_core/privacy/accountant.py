"""What releases spend together.

One step of private training is a Gaussian mechanism on a Poisson sample. Google's dp-accounting
composes the privacy loss distributions of all steps on a grid ("connect the dots"), so the epsilon
is an upper bound; the larger of the two directions of the neighbourhood, a record added and a
record removed, counts. Our own are the size of the grid and the sum that holds for any choice.

Sources: Doroshenko et al., "Connect the Dots", PoPETs 2022 (distributions); Mironov, Talwar & Zhang
2019 (Renyi divergence); Lebeda et al. 2024 (why both directions).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, logsumexp

Array = NDArray[np.float64]

FIXED_ORDERS = (2, 3, 4, 5, 6, 7, 9, 12, 17, 25, 40, 80, 200, 513)
"""Of :func:`adaptive_epsilon`: near the best for epsilons from 50 down to 0.05. Each costs a part
of delta; small ones lie closely: at low rates with little noise the next order may be far worse."""
ORDERS: tuple[int, ...] = tuple(np.unique(np.geomspace(2, 2048, 80).astype(int)).tolist())
COARSENESS = 4e-4
"""Variance that the grid may add, relative to that of the whole loss."""
FEWEST, MOST = 2**12, 2**20
"""Points of a grid, from 0 to where the tail has hardly any of delta."""
LARGEST_LOSS = 100.0
"""Beyond, an epsilon is the bound by Renyi divergence alone: nothing is hidden."""
ROUNDING = 2.0**-52
"""Part of delta, absolute, that the transform may be wrong by for each step that is composed."""
SMALLEST_DELTA = 9e-11
"""Below, the rounding of the transform would be a part of delta that one can see."""


@dataclass(frozen=True)
class DpEvent:
    """Steps of one Gaussian mechanism on Poisson samples."""

    sample_rate: float
    """Probability that a record is in a step's batch; 1: always."""
    noise_multiplier: float
    """Standard deviation of the noise in clipping bounds."""
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
    together, orders = with_steps_added(spent), np.array(FIXED_ORDERS)
    if not together:
        return 0.0
    own = delta / len(orders)
    tails = (math.log(1 / own) - np.log(orders)) / (orders - 1) + np.log1p(-1 / orders)
    return max(0.0, float(np.min(renyi(together, FIXED_ORDERS) + tails)))


def with_steps_added(spent: Iterable[DpEvent]) -> tuple[DpEvent, ...]:
    """Equal mechanisms together, in a fixed order."""
    steps: dict[tuple[float, float], int] = {}
    for each in spent:
        key = each.sample_rate, each.noise_multiplier
        steps[key] = steps.get(key, 0) + each.steps
    return tuple(DpEvent(q, sigma, n) for (q, sigma), n in sorted(steps.items()))


def renyi(spent: Sequence[DpEvent], orders: Sequence[int] = ORDERS) -> Array:
    """Return the Renyi divergence of the whole at each order, ``(orders,)``: of a batch with the
    record from one without it, which is the larger direction."""
    each = [
        [e.steps * _renyi(e.sample_rate, e.noise_multiplier, order) for order in orders]
        for e in spent
    ]
    total: Array = np.sum(each, axis=0)
    return total


@lru_cache(maxsize=2**16)
def _renyi(q: float, sigma: float, order: int) -> float:
    if q == 1:
        return order / (2 * sigma**2)
    k = np.arange(order + 1)
    ways = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
    terms = ways + (order - k) * math.log1p(-q) + k * math.log(q) + k * (k - 1) / (2 * sigma**2)
    return max(0.0, float(logsumexp(terms)) / (order - 1))


@lru_cache(maxsize=4096)
def _epsilon(spent: tuple[DpEvent, ...], delta: float) -> float:
    if not spent:
        return 0.0
    bound = _renyi_bound(spent, delta)
    left = delta - _rounding(spent)
    if bound > LARGEST_LOSS or left <= 0:
        return bound
    return min(bound, float(_distribution(spent, delta).get_epsilon_for_delta(left)))


def _renyi_bound(spent: Sequence[DpEvent], delta: float) -> float:
    return float(np.min(renyi(spent) + math.log(1 / delta) / (np.array(ORDERS) - 1)))


def _rounding(spent: Sequence[DpEvent]) -> float:
    return ROUNDING * sum(each.steps for each in spent if each.sample_rate < 1)


def privacy_curve(spent: Iterable[DpEvent], epsilons: Array, delta: float) -> tuple[Array, Array]:
    """Return those epsilons, 0 or more, that are not beyond every curve, rising, and the delta of
    all of it together at each: the larger of the two directions, an upper bound. ``delta`` is the
    smallest that has to be told apart: how fine the grid is."""
    together = with_steps_added(spent)
    chosen = np.unique(epsilons[epsilons <= LARGEST_LOSS])
    if _renyi_bound(together, delta) > LARGEST_LOSS:
        return chosen, np.ones(len(chosen))
    deltas = np.array(_distribution(together, delta).get_delta_for_epsilon(chosen))
    return chosen, np.clip(deltas + _rounding(together), 0.0, 1.0)


def _distribution(spent: Sequence[DpEvent], delta: float) -> Any:
    """Return the privacy loss distribution of the whole. Gaussians without sampling are one whose
    precision is the sum of theirs."""
    interval = _interval(spent, delta)
    sampled = [each for each in spent if each.sample_rate < 1]
    parts = [
        _of_steps(each.sample_rate, each.noise_multiplier, each.steps, interval) for each in sampled
    ]
    precision = sum(e.steps / e.noise_multiplier**2 for e in spent if e.sample_rate == 1)
    parts += [_of_step(1.0, 1 / math.sqrt(precision), interval)] if precision else []
    return reduce(lambda first, second: first.compose(second), parts)


@lru_cache(maxsize=32)
def _of_steps(sample_rate: float, noise_multiplier: float, steps: int, interval: float) -> Any:
    return _of_step(sample_rate, noise_multiplier, interval).self_compose(steps)


@lru_cache(maxsize=32)
def _of_step(sample_rate: float, noise_multiplier: float, interval: float) -> Any:
    # not at the start of the command line, which states nothing
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier, value_discretization_interval=interval, sampling_prob=sample_rate
    )


def _interval(spent: Sequence[DpEvent], delta: float) -> float:
    """Return the distance of the grid's points: a power of two, so that equal steps are put on it
    once while a ledger grows."""
    reach, steps = _renyi_bound(spent, delta / 1e4), sum(each.steps for each in spent)
    finest = math.sqrt(COARSENESS * 4 * max(renyi(spent)[0], 1e-12) / steps)
    width = min(max(finest, reach / MOST), reach / FEWEST)
    return float(2.0 ** math.floor(math.log2(width)))
