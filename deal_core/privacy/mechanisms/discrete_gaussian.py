"""Whole numbers with the density of a Gaussian, for noise that is added up before anybody sees it.

Source: Canonne, Kamath & Steinke, NeurIPS 2020, arXiv 2004.00010, algorithms 1 and 3, for whole
arrays at a time. What they draw with exact fractions is drawn with numbers of 53 bits here:
:func:`~deal_core.privacy.accounting.shared_noise.density_gap` counts the difference.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deal_core.privacy.mechanisms.noise import NoiseSource

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
    low = np.minimum((_uniform(tries, noise) * width).astype(np.int64), width - 1)
    low = low[_uniform(tries, noise) <= np.exp(-low / width)]
    high = np.floor(-np.log(_uniform(len(low), noise))).astype(np.int64)
    size = low + width * high
    negative = _uniform(len(low), noise) <= 0.5
    once = ~(negative & (size == 0))  # else zero would be drawn twice as often
    return np.where(negative, -size, size)[once]


def _uniform(count: int, noise: NoiseSource) -> NDArray[np.float64]:
    return np.asarray(noise.uniform(count).numpy(), np.float64)
