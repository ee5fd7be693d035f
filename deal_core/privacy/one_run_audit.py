"""A lower bound on epsilon from one training run: what an attack that worked refutes.

Each of ``m`` canaries is in the training data or not, by a fair coin of its own. Whoever has only
what was released guesses the coins of ``r`` canaries, those that it is surest of, and is right
``v`` times. A mechanism of small epsilon makes many right guesses improbable; the largest epsilon
that makes them too improbable is refuted, so the true one lies above it.

How many guesses to make is a choice, and the best of several choices looks better than it is. So
the choices are fixed beforehand (:data:`GUESSES`), and each gets an equal part of the error that is
allowed: the bound is the largest of all, and holds at the confidence asked for.

Source: Steinke, Nasr & Jagielski, "Privacy auditing with one (1) training run", NeurIPS 2023,
theorem 5.2 and appendix D.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc
from scipy.stats import binom

GUESSES = (0.05, 0.2, 1.0)
"""Share of the canaries that is guessed: the surest few, more, all."""
CONFIDENCE = 0.95
LARGEST = 64.0
"""No bound above: no number of canaries that can be trained on would give one."""
HALVINGS = 30


@dataclass(frozen=True)
class LowerBound:
    """What one audit refutes.

    Attributes:
        epsilon: every smaller one is refuted; 0: none is.
        delta: at which.
        confidence: probability, at least, that the bound is not above the truth.
        canaries, guesses, correct: ``m``, ``r`` and ``v`` of the choice that gave the bound.
    """

    epsilon: float
    delta: float
    confidence: float
    canaries: int
    guesses: int
    correct: int


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Probability, at most, of ``correct`` or more right guesses under (epsilon, delta)-DP.

    Args:
        canaries: each in the data by a fair coin of its own.
        guesses: made on some of them, from what was released alone.
        correct: of the guesses.
        epsilon, delta: what is put to the test; neighbours differ by one canary that is there
            or not.

    Raises:
        ValueError: numbers that do not fit together.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"{correct} right of {guesses} guesses about {canaries} canaries")
    if epsilon < 0 or not 0 <= delta <= 1:
        raise ValueError(f"no such guarantee: epsilon {epsilon}, delta {delta}")
    right = 1 / (1 + math.exp(-epsilon))
    if correct == 0:
        return 1.0
    pure = float(betainc(correct, guesses - correct + 1, right))
    if delta == 0:
        return pure
    # what delta can add: the likeliest i right guesses too few, spread over those i
    fewer = np.arange(1, correct + 1)
    near = np.cumsum(binom.pmf(correct - fewer, guesses, right))
    return min(1.0, pure + 2 * canaries * delta * float(np.max(near / fewer)))


def refuted_epsilon(
    canaries: int, guesses: int, correct: int, delta: float, error: float = 1 - CONFIDENCE
) -> float:
    """The largest epsilon whose p-value is below ``error``; 0 where none is."""

    def refuted(epsilon: float) -> bool:
        return p_value(canaries, guesses, correct, epsilon, delta) < error

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
        if high > LARGEST:
            return LARGEST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def audit(
    scores: NDArray[np.float64] | Sequence[float],
    included: NDArray[np.bool_] | Sequence[bool],
    delta: float,
    confidence: float = CONFIDENCE,
) -> LowerBound:
    """The lower bound from one score per canary.

    Half of the guesses are "in", for the highest scores, half are "out", for the lowest.

    Args:
        scores: ``(m,)``, higher where a canary looks as if it had been trained on; computed
            from what was released, without a look at the coins.
        included: ``(m,)``, how the coins fell.
        delta: at which epsilon is bounded.
        confidence: of the bound, over all choices of :data:`GUESSES` together.

    Raises:
        ValueError: no canary, different lengths, or a score that is not a number.
    """
    values, coins = np.asarray(scores, np.float64), np.asarray(included, bool)
    if values.ndim != 1 or values.shape != coins.shape or not len(values):
        raise ValueError(f"{values.shape} scores for {coins.shape} canaries")
    if np.isnan(values).any():
        raise ValueError("a score is not a number")
    ranked = coins[np.argsort(values, kind="stable")]
    error = (1 - confidence) / len(GUESSES)
    bounds = [_bound(ranked, share, delta, error, confidence) for share in GUESSES]
    return max(bounds, key=lambda bound: bound.epsilon)


def _bound(
    ranked: NDArray[np.bool_], share: float, delta: float, error: float, confidence: float
) -> LowerBound:
    """By guessing this share of the canaries, which are in the order of their scores."""
    m = len(ranked)
    each = max(1, round(share * m / 2)) if m > 1 else 0
    low, high = ranked[:each], ranked[m - each :]
    guesses, correct = len(low) + len(high), int((~low).sum() + high.sum())
    epsilon = refuted_epsilon(m, guesses, correct, delta, error)
    return LowerBound(epsilon, delta, confidence, m, guesses, correct)
