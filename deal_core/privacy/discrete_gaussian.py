"""Whole numbers with the density of a Gaussian, for noise that is added up before anybody sees it.

Source: Canonne, Kamath & Steinke, NeurIPS 2020, arXiv 2004.00010, algorithms 1 and 3, for whole
arrays at a time. What they draw with exact fractions is drawn with floating-point numbers here,
each right to a relative error of ``2^-52`` down to probabilities of ``2^-54``:
:func:`~deal_core.privacy.distributed_noise.density_gap` counts the difference.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deal_core.privacy.noise import NoiseSource

BITS = 2**53
"""Values that one draw of a source can have."""
Integers = NDArray[np.int64]


def discrete_gaussian(count: int, sigma: float, noise: NoiseSource) -> Integers:
    """Return independent whole numbers, ``(count,)``: ``k`` with a probability proportional to
    ``exp(-k^2 / (2 sigma^2))``.

    Args:
        count: how many.
        sigma: positive, at most 2^31.
        noise: of all draws.

    Raises:
        ValueError: another sigma.
    """
    if not 0 < sigma <= 2**31:
        raise ValueError(f"no such sigma: {sigma}")
    width = int(sigma) + 1
    kept: list[Integers] = []
    missing = count
    while missing > 0:
        drawn = _discrete_laplace(2 * missing + 16, width, noise)
        gap = np.abs(drawn) - sigma**2 / width
        accepted = drawn[_uniform(len(drawn), noise) <= np.exp(-(gap**2) / (2 * sigma**2))]
        kept.append(accepted[:missing])
        missing -= len(kept[-1])
    return np.concatenate(kept) if kept else np.empty(0, np.int64)


def _discrete_laplace(tries: int, width: int, noise: NoiseSource) -> Integers:
    """Return at most so many whole numbers with probabilities proportional to
    ``exp(-abs(k) / width)``."""
    low = _below(width, tries, noise)
    low = low[_uniform(len(low), noise) <= np.exp(-low / width)]
    high = np.floor(-np.log(_uniform(len(low), noise))).astype(np.int64)
    size = low + width * high
    negative = _uniform(len(low), noise) <= 0.5
    once = ~(negative & (size == 0))  # else zero would be drawn twice as often
    return np.where(negative, -size, size)[once]


def _below(width: int, count: int, noise: NoiseSource) -> Integers:
    """Return whole numbers below ``width``, each as likely as another; a few fewer than asked."""
    drawn = (noise.uniform(count).numpy() * BITS).astype(np.int64) - 1
    return np.asarray(drawn[drawn < BITS // width * width] % width, np.int64)


def _uniform(count: int, noise: NoiseSource) -> NDArray[np.float64]:
    """Return numbers in (0, 1] of 106 bits, rounded to the precision of their size."""
    high, low = noise.uniform(count).numpy(), noise.uniform(count).numpy()
    return np.asarray((high - 1 / BITS) + low / BITS, np.float64)
