"""A claim under test: that what a ledger holds is what was done.

Whoever has only what was released guesses the coins of the canaries that it is surest of. The claim
is the ledger's mechanism, its noise, sampling rates and numbers of steps, composed, with its whole
trade-off curve (:mod:`deal_core.privacy.audit.tradeoff`). Beside it stand the claims of the same
mechanism with more or less noise: the least noise that is refuted gives the lower bound on epsilon.

One run alone refutes little: a mechanism may leak much more than usual with a small probability.
It cannot do so every time, so that independent repetitions are judged together.

Source: Berk & Jones, Z. Wahrscheinlichkeitstheorie 1979 (one p-value from several, one-sided).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc, betaincinv
from scipy.stats import binom

from deal_core.privacy.accountant import DpEvent, epsilon_of, with_steps_added
from deal_core.privacy.audit.tradeoff import TradeOff, p_value, trade_off

SIGNIFICANCE = 0.05
"""A claim is refuted where guesses as right as these are less probable under it."""
LEAST, MOST = 1 / 16, 16.0
"""Noise, in units of what was claimed, between which the least that is refuted is looked for."""
CLOSE = 1.02
"""Ratio to which it is known."""
CHOICES = ((0.025, 0.025), (0.1, 0.1), (0.5, 0.5), (0.0, 0.1))
"""Shares of the canaries that are guessed "out", those of the lowest scores, and "in", those of the
highest: the surest few, more, all, and, since a record that is seldom sampled can be seen to be
there but not to be away, some that are in alone. Fixed beforehand: the best of several choices
looks better than it is, and is paid for."""


@dataclass(frozen=True)
class Guesses:
    """Attributes: ``canaries``, how many there are; ``guesses`` made; ``correct`` of them."""

    canaries: int
    guesses: int
    correct: int


def guess(
    scores: NDArray[np.float64] | Sequence[float], included: NDArray[np.bool_] | Sequence[bool]
) -> tuple[Guesses, ...]:
    """Guess those with the highest scores to be there, those with the lowest to be away.

    Args:
        scores: ``(m,)``, higher where a canary looks as if it had been trained on; computed
            from what was released, without a look at the coins.
        included: ``(m,)``, how the coins fell.

    Returns:
        One outcome for each of :data:`CHOICES`.

    Raises:
        ValueError: no canary, different lengths, or a score that is not a number.
    """
    values, coins = np.asarray(scores, np.float64), np.asarray(included, bool)
    if values.ndim != 1 or values.shape != coins.shape or not len(values):
        raise ValueError(f"{values.shape} scores for {coins.shape} canaries")
    if np.isnan(values).any():
        raise ValueError("a score is not a number")
    ranked = coins[np.argsort(values, kind="stable")]
    return tuple(_outcome(ranked, out, there) for out, there in CHOICES)


def _outcome(ranked: NDArray[np.bool_], out: float, there: float) -> Guesses:
    """By guessing these shares of the canaries, which are in the order of their scores."""
    m = len(ranked)
    lowest = _count(out, m)
    low, high = ranked[:lowest], ranked[m - min(_count(there, m), m - lowest) :]
    return Guesses(m, len(low) + len(high), int((~low).sum() + high.sum()))


def _count(share: float, m: int) -> int:
    return max(1, round(share * m)) if share and m > 1 else 0


@dataclass(frozen=True)
class Repetition:
    """One training with canaries.

    Attributes:
        spent: what the ledger holds of it.
        outcomes: of the guesses, one for every choice of how many.
    """

    spent: tuple[DpEvent, ...]
    outcomes: tuple[Guesses, ...]


@dataclass(frozen=True)
class LowerBound:
    """What one audit refutes.

    Attributes:
        epsilon: of the least noise that is refuted, at ``delta``: if the mechanism is the claimed
            one but for its noise, its epsilon is at least this, with 95 % confidence; 0: none is.
        delta: at which.
        scale: the least noise that is refuted, in units of what was claimed; at 1 or below the
            claim itself is refuted; None: none is.
    """

    epsilon: float
    delta: float
    scale: float | None


def claim_p_value(repetitions: Sequence[Repetition], scale: float = 1.0) -> float:
    """Return the probability, at most, of guesses as right as these if the ledgers are true, but
    for so many times the noise; over all choices of how many to guess."""
    p_values = [_p_values(each, scale) for each in repetitions]
    choices = [combined(choice) for choice in zip(*p_values, strict=True)]
    return min(1.0, len(choices) * min(choices))


def lower_bound(repetitions: Sequence[Repetition], delta: float) -> LowerBound:
    """Return the bound on epsilon that the least noise gives that is refuted."""

    def refuted(scale: float) -> bool:
        return claim_p_value(repetitions, scale) < SIGNIFICANCE

    low, high = LEAST, MOST
    if not refuted(high):
        return LowerBound(0.0, delta, None)
    if refuted(low):
        high = low
    while high / low > CLOSE:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if refuted(middle) else (middle, high)
    least = min(epsilon_of(_scaled(each.spent, high), delta) for each in repetitions)
    return LowerBound(least, delta, high)


def _scaled(spent: Sequence[DpEvent], scale: float) -> tuple[DpEvent, ...]:
    return tuple(replace(e, noise_multiplier=scale * e.noise_multiplier) for e in spent)


def _p_values(repetition: Repetition, scale: float) -> list[float]:
    curve = _curve(with_steps_added(_scaled(repetition.spent, scale)))
    return [p_value(g.canaries, g.guesses, g.correct, curve) for g in repetition.outcomes]


@lru_cache(maxsize=64)
def _curve(spent: tuple[DpEvent, ...]) -> TradeOff:
    return trade_off(spent)


def combined(p_values: Sequence[float]) -> float:
    """Return the p-value of all; each alone is at most ``x`` with probability at most ``x``,
    whatever the others are.

    Raises:
        ValueError: there is none.
    """
    if not len(p_values):
        raise ValueError("no p-value to combine")
    count = len(p_values)
    if count == 1:
        return float(p_values[0])
    ranks = np.arange(1, count + 1)
    levels = betainc(ranks, count - ranks + 1, np.sort(p_values))
    return _any_below(betaincinv(ranks, count - ranks + 1, float(levels.min())))


def _any_below(bounds: np.ndarray) -> float:
    """Probability that some ``j``-th smallest of so many uniform numbers is below its bound."""
    count, before = len(bounds), 0.0
    fine = np.zeros(count + 1)  # of the number below the last bound, where all was well
    fine[0] = 1.0
    found, numbers = 0.0, np.arange(count + 1)
    for j, bound in enumerate(bounds.tolist()):
        share = (bound - before) / (1 - before) if before < 1 else 1.0
        more = np.maximum(numbers - numbers[: j + 1, None], 0)
        reached = numbers >= numbers[: j + 1, None]
        steps = np.where(reached, binom.pmf(more, count - numbers[: j + 1, None], share), 0.0)
        moved = fine[: j + 1] @ steps
        found += float(moved[j + 1 :].sum())
        fine = moved
        fine[j + 1 :] = 0.0
        before = bound
    return min(1.0, found)
