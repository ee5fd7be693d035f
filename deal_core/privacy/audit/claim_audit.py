"""A claim under test: that what a ledger holds is what was done.

The claim is the ledger's mechanism, its noise, sampling rates and numbers of steps, composed, with
its whole trade-off curve. Beside it stand the claims of the same mechanism with more or less
noise: the least noise that is refuted says how much the mechanism lacks, or leaves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from deal_core.privacy.accountant import DpEvent, epsilon_of, with_steps_added
from deal_core.privacy.audit.guesses import Guesses
from deal_core.privacy.audit.one_run_audit import CONFIDENCE, over_choices
from deal_core.privacy.audit.trade_off_audit import p_value
from deal_core.privacy.audit.tradeoff import TradeOff, trade_off

LEAST, MOST = 1 / 16, 16.0
"""Noise, in units of what was claimed, between which the least that is refuted is looked for."""
CLOSE = 1.02
"""Ratio to which it is known."""


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
class LeastRefuted:
    """The least noise that is refuted.

    Attributes:
        scale: in units of what was claimed; at 1 or below the claim itself is refuted.
        epsilon: of that much noise, at ``delta``: if the mechanism is the claimed one but for its
            noise, its epsilon is at least this, with 95 % confidence.
    """

    scale: float
    epsilon: float
    delta: float


def claim_p_value(repetitions: Sequence[Repetition]) -> float:
    """Probability, at most, of guesses as right as these if the ledgers are true."""
    return _scaled(repetitions, 1.0)


def least_refuted(repetitions: Sequence[Repetition], delta: float) -> LeastRefuted | None:
    """Return the least noise that is refuted; None: not even the most is."""

    def refuted(scale: float) -> bool:
        return _scaled(repetitions, scale) < 1 - CONFIDENCE

    low, high = LEAST, MOST
    if not refuted(high):
        return None
    if refuted(low):
        high = low
    while high / low > CLOSE:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if refuted(middle) else (middle, high)
    least = min(epsilon_of(scaled(each.spent, high), delta) for each in repetitions)
    return LeastRefuted(high, least, delta)


def scaled(spent: Sequence[DpEvent], scale: float) -> tuple[DpEvent, ...]:
    """Return the same with so many times the noise."""
    return tuple(replace(e, noise_multiplier=scale * e.noise_multiplier) for e in spent)


def _scaled(repetitions: Sequence[Repetition], scale: float) -> float:
    return over_choices([_p_values(each, scale) for each in repetitions])


def _p_values(repetition: Repetition, scale: float) -> list[float]:
    curve = _curve(with_steps_added(scaled(repetition.spent, scale)))
    return [p_value(g.canaries, g.guesses, g.correct, curve) for g in repetition.outcomes]


@lru_cache(maxsize=64)
def _curve(spent: tuple[DpEvent, ...]) -> TradeOff:
    return trade_off(spent)
