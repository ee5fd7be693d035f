"""From scores of canaries to guesses of their coins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CHOICES = ((0.025, 0.025), (0.1, 0.1), (0.5, 0.5), (0.0, 0.1))
"""Shares of the canaries that are guessed "out", those of the lowest scores, and "in", those of the
highest: the surest few, more, all, and, since a record that is seldom sampled can be seen to be
there but not to be away, some that are in alone. Fixed beforehand: the best of several choices
looks better than it is, and is paid for."""
ALL = 2
"""The choice that guesses all."""


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
