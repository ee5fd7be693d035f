"""Binomial probabilities of many counts at once.

``scipy.stats`` checks and broadcasts its arguments for longer than the numbers take, and an audit
asks for thousands.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln, xlog1py, xlogy


def probability(successes: ArrayLike, trials: ArrayLike, share: float) -> NDArray[np.float64]:
    """Return the probability of exactly so many successes, each from 0 to its ``trials``."""
    k, n = np.asarray(successes, float), np.asarray(trials, float)
    ways = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    return np.asarray(np.exp(ways + xlogy(k, share) + xlog1py(n - k, -share)))
