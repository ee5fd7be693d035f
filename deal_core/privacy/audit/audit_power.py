"""What an audit could have noticed: its power, by playing it against weakened mechanisms.

The attack is the best there is: it sees every step's noised sum along each canary, and nothing
else is in it. A real one that is right less often has less power.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from deal_core.privacy.accountant import DpEvent, with_steps_added
from deal_core.privacy.audit.guesses import ALL, Guesses, guess
from deal_core.privacy.audit.one_run_audit import CONFIDENCE, over_choices
from deal_core.privacy.audit.planted import likelihood_ratio
from deal_core.privacy.audit.trade_off_audit import p_value
from deal_core.privacy.audit.tradeoff import TradeOff, trade_off

SURE = 0.8
"""Share of the audits that must notice."""
AUDITS = 60
"""Audits that are played for one scale."""
POOL = 20_000
"""Canaries of either kind that their scores are drawn from."""
SCALES = tuple(percent / 100 for percent in range(95, 0, -5))
"""Noise that is left, of what is claimed."""


@dataclass(frozen=True)
class Power:
    """What an audit would notice.

    Attributes:
        scale: noise times this, or less, is refuted in at least 80 % of such audits; 0: none of
            :data:`SCALES` is.
        canaries, repetitions: of the audit.
        accuracy: share of right guesses of this attack, if all canaries are guessed and the
            mechanism is as claimed.
    """

    scale: float
    canaries: int
    repetitions: int
    accuracy: float


def audit_power(spent: Sequence[DpEvent], canaries: int, repetitions: int, seed: int) -> Power:
    """Play audits of a mechanism with less and less noise, until enough of them notice.

    Args:
        spent: what the ledger claims.
        canaries: in each repetition.
        repetitions: of the training.
        seed: of all that is drawn.

    Returns:
        How much noise may be left for enough of them to notice, and how often the attack is right.
    """
    claim = with_steps_added(spent)
    curve = trade_off(claim)
    rng = np.random.default_rng(seed)
    honest = _Pool(*(_scores(claim, 1.0, there, rng) for there in (False, True)))
    accuracy = float(np.mean([_right(honest, canaries, rng) for _ in range(AUDITS)]))

    def noticed(scale: float) -> bool:
        pool = _Pool(*(_scores(claim, scale, there, rng) for there in (False, True)))
        return _noticed(pool, curve, canaries, repetitions, rng) >= SURE

    # the first of the falling scales that is noticed
    first = bisect_left(SCALES, True, key=noticed)
    scale = SCALES[first] if first < len(SCALES) else 0.0
    return Power(scale, canaries, repetitions, accuracy)


@dataclass(frozen=True)
class _Pool:
    """Scores of canaries that are not there, and of such that are."""

    out: NDArray[np.float64]
    there: NDArray[np.float64]

    def audit(self, canaries: int, rng: np.random.Generator) -> tuple[Guesses, ...]:
        """One repetition."""
        coins = rng.random(canaries) < 0.5
        drawn = rng.integers(POOL, size=canaries)
        return guess(np.where(coins, self.there[drawn], self.out[drawn]), coins)


def _scores(
    spent: Sequence[DpEvent], scale: float, there: bool, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Return scores, ``(POOL,)``, as :class:`~deal_core.privacy.audit.planted.NoisedSteps` gives
    them, with so much of the noise."""
    total = np.zeros(POOL)
    for each in spent:
        score = partial(
            likelihood_ratio,
            sample_rate=each.sample_rate,
            noise_multiplier=each.noise_multiplier,
        )
        for _ in range(each.steps):
            along = scale * each.noise_multiplier * rng.standard_normal(POOL)
            if there:
                along += rng.random(POOL) < each.sample_rate
            total += score(along)
    return total


def _right(pool: _Pool, canaries: int, rng: np.random.Generator) -> float:
    every = pool.audit(canaries, rng)[ALL]
    return every.correct / every.guesses


def _noticed(
    pool: _Pool, curve: TradeOff, canaries: int, repetitions: int, rng: np.random.Generator
) -> float:
    known: dict[tuple[int, int], float] = {}

    def judge(outcome: Guesses) -> float:
        # neighbours together, a quarter of a standard deviation at most, as the least of them
        step = max(1, int(math.sqrt(outcome.guesses) / 8))
        key = outcome.guesses, outcome.correct // step * step
        if key not in known:
            known[key] = p_value(outcome.canaries, *key, curve)
        return known[key]

    audits = [[pool.audit(canaries, rng) for _ in range(repetitions)] for _ in range(AUDITS)]
    p_values = [[[judge(g) for g in outcomes] for outcomes in audit] for audit in audits]
    return float(np.mean([over_choices(each) < 1 - CONFIDENCE for each in p_values]))
