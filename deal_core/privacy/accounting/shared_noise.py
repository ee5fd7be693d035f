"""What noise that several sites make together is worth: the sum of their discrete Gaussians.

Every site rounds its clipped sum to a grid and adds a discrete Gaussian of its own. The sum over
sites is all that is seen. Up to a factor ``exp(+-gap)`` its density is that of a rounded
continuous Gaussian, so its cost is the Gaussian's and ``2 * gap`` a release: (M60) of
docs/method.md has the theorem and its proof.

Sources: Kairouz, Liu & Steinke, ICML 2021, arXiv 2102.06387, theorem 2 (the sum of discrete
Gaussians); Canonne, Kamath & Steinke, NeurIPS 2020, arXiv 2004.00010 (one of them).
"""

from __future__ import annotations

import math

UNLIKELY = 1e-30
"""Probability of noise so long that the bound on the gap says nothing."""


def density_gap(sigma: float, shares: int, dimensions: int) -> float:
    """Return the largest absolute logarithm of the ratio of two densities, outside of a set of
    probability :data:`UNLIKELY`: of the sum of discrete Gaussians, and of a rounded Gaussian of
    the same variance. Draws with floating-point numbers add to that set what they hardly give:
    below 1e-18 for 1,000 numbers.

    Args:
        sigma: standard deviation of the whole sum, in steps of the grid; 1 or more for a share.
        shares: how many discrete Gaussians of equal variance are added.
        dimensions: independent coordinates.

    Raises:
        ValueError: a share has a standard deviation below 1: its sum is no Gaussian's.
    """
    share = sigma / math.sqrt(shares)
    if share < 1:
        raise ValueError("the grid is too coarse for the noise")
    longest = math.sqrt(dimensions) * (1 + 1 / (2 * sigma)) + math.sqrt(2 * math.log(1 / UNLIKELY))
    rounding = max(dimensions / 8, longest**2 / 24) / sigma**2
    exponent = -2 * math.pi**2 * share**2
    adding = sum(10 * math.exp(exponent * k / (k + 1)) for k in range(1, shares))
    normaliser = 3 * math.exp(-2 * math.pi**2 * sigma**2)
    drawing = shares * 2.0**-48  # some dozen draws a share, each right to 2^-52
    return rounding + dimensions * (adding + normaliser + drawing)
