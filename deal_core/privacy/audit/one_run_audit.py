"""A lower bound on epsilon from training runs: what an attack that worked refutes.

Each of ``m`` canaries is in the training data or not, by a fair coin of its own. Whoever has only
what was released guesses the coins of ``r`` canaries, those that it is surest of, and is right
``v`` times. A mechanism of small epsilon makes many right guesses improbable; the largest epsilon
that makes them too improbable is refuted, so the true one lies above it. Nothing is assumed of
the mechanism but that it is (epsilon, delta)-private, or not.

Repetitions have coins and noise of their own: :mod:`deal_core.privacy.audit.repetitions`. How many
guesses to make is fixed beforehand, and each choice gets an equal part of the error that is
allowed: the bound is the largest of all, and holds at the confidence asked for.

Source: Steinke, Nasr & Jagielski, "Privacy auditing with one (1) training run", NeurIPS 2023,
theorem 5.2 and appendix D.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import betainc

from deal_core.privacy.audit.binomial import probability
from deal_core.privacy.audit.guesses import Guesses
from deal_core.privacy.audit.repetitions import combined

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
        canaries, guesses, correct: of the choice that gave the bound, in all repetitions together.
    """

    epsilon: float
    delta: float
    confidence: float
    canaries: int
    guesses: int
    correct: int


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Return the probability, at most, of ``correct`` or more right guesses under (epsilon,
    delta)-DP.

    Args:
        canaries: each in the data by a fair coin of its own.
        guesses: made on some of them, from what was released alone.
        correct: of the guesses.
        epsilon: what is put to the test; neighbours differ by one canary that is there or not.
        delta: of the same claim.

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
    near = np.cumsum(probability(correct - fewer, guesses, right))
    return min(1.0, pure + 2 * canaries * delta * float(np.max(near / fewer)))


def over_choices(p_values: Sequence[Sequence[float]]) -> float:
    """Return the p-value of all repetitions together, over all choices of how many to guess.

    Args:
        p_values: of each repetition, one for every choice, in the same order.
    """
    each = [combined(choice) for choice in zip(*p_values, strict=True)]
    return min(1.0, len(each) * min(each))


def refuted_epsilon(choice: Sequence[Guesses], delta: float, error: float) -> float:
    """Return the largest epsilon whose p-value over all repetitions of one choice is below
    ``error``; 0 where none is."""

    def refuted(epsilon: float) -> bool:
        each = [p_value(g.canaries, g.guesses, g.correct, epsilon, delta) for g in choice]
        return combined(each) < error

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


def lower_bound(repetitions: Sequence[Sequence[Guesses]], delta: float) -> LowerBound:
    """Return a lower bound from one or more repetitions.

    Args:
        repetitions: of each, the outcome of every choice, in the same order.
        delta: at which epsilon is bounded.

    Returns:
        The largest bound of all choices; it holds at :data:`CONFIDENCE` over all of them together.
    """
    choices = list(zip(*repetitions, strict=True))
    error = (1 - CONFIDENCE) / len(choices)
    bounds = [
        LowerBound(
            refuted_epsilon(choice, delta, error),
            delta,
            CONFIDENCE,
            sum(each.canaries for each in choice),
            sum(each.guesses for each in choice),
            sum(each.correct for each in choice),
        )
        for choice in choices
    ]
    return max(bounds, key=lambda bound: bound.epsilon)
