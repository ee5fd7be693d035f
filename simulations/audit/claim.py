"""A claim under test: that what a ledger holds is what was done.

Whoever has only what was released guesses the coins of the canaries that it is surest of. The claim
is the ledger's mechanism, its noise, sampling rates and numbers of steps, composed, with its whole
trade-off curve. Beside it stand the claims of the same mechanism with more or less noise: the least
noise that is refuted gives the lower bound on epsilon. A test needs no more of a sampled mechanism
than of another: coins of the canaries that are independent of each other and of the data, scores
that are made without them, and a curve that holds for each canary.

For a test of "the record was not there" with false alarms at rate ``y``, at most
``fbar(y) = min over epsilon of delta(epsilon) + e^epsilon y`` of the cases where it was there are
found, epsilon below zero included. Of ``m`` canaries, each there or not by a fair coin of its own,
``r`` are guessed, and ``C`` of the guesses are right. With ``p_i = P(C = i)``, for every ``t``,

    sum_{i >= t} i/m p_i  <=  fbar( sum_{i >= t-1} (r - i)/m p_i ),

as docs/audit.md explains. The largest ``P(C >= c)`` that all of these allow is the p-value. It has
all its mass at ``c`` (more right guesses would only ask for more); below ``c`` come, from ``t = c``
down, the smallest masses that the inequalities need; where these pass 1, so much is impossible. One
run refutes little: a mechanism may leak much more than usual with a small probability. It cannot do
so every time, so independent repetitions are judged together.

Sources: Dong, Roth & Su, "Gaussian differential privacy", JRSS B 2022, proposition 6 (there
``f(y) = 1 - fbar(y)``); Mahloujifar, Melis & Chaudhuri, "Auditing f-differential privacy in one
run", ICML 2025, theorem 9 and algorithm 3; Berk & Jones, Z. Wahrscheinlichkeitstheorie 1979 (one
p-value from several, one-sided).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc, betaincinv
from scipy.stats import binom

from deal_core.privacy.accountant import DpEvent, epsilon_of, privacy_curve, with_steps_added
from server.results import Strict

Array = NDArray[np.float64]

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

FINEST = 1e-5
"""A delta that must be told from zero: canaries by the thousand cannot see a smaller one."""
EPSILONS = np.concatenate([[0.0], np.geomspace(1e-3, 40.0, 400)])

CANDIDATES = 32
"""Probabilities that are tried together."""
ROUNDS = 2
"""How often they close in: what is returned is at most 32^-2 above the truth, and never below."""


@dataclass(frozen=True)
class Guesses:
    """How many canaries there are, how many were guessed, and how many guesses are right."""

    canaries: int
    guesses: int
    correct: int


def guess(scores: Array, included: NDArray[np.bool_]) -> tuple[Guesses, ...]:
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
    if scores.ndim != 1 or scores.shape != included.shape or not len(scores):
        raise ValueError(f"{scores.shape} scores for {included.shape} canaries")
    if np.isnan(scores).any():
        raise ValueError("a score is not a number")
    ranked, m = included[np.argsort(scores, kind="stable")], len(scores)

    def count(share: float) -> int:
        return max(1, round(share * m)) if share and m > 1 else 0

    outcomes = []
    for out, there in CHOICES:
        low = ranked[: count(out)]
        high = ranked[m - min(count(there), m - len(low)) :]
        outcomes.append(Guesses(m, len(low) + len(high), int((~low).sum() + high.sum())))
    return tuple(outcomes)


class Repetition(Strict):
    """One training with canaries."""

    spent: tuple[DpEvent, ...]
    """What the ledger holds of it, equal steps together."""
    outcomes: tuple[Guesses, ...]
    """Of the guesses, one for every choice of how many."""


@dataclass(frozen=True)
class LowerBound:
    """What one audit refutes."""

    epsilon: float
    """Of the least noise that is refuted: if the mechanism is the claimed one but for its noise,
    its epsilon at ``delta`` is at least this, with 95 % confidence; 0: none is."""
    delta: float
    scale: float | None
    """The least noise that is refuted, in units of what was claimed; at 1 or below the claim itself
    is refuted; None: none is."""


def claim_p_value(repetitions: Sequence[Repetition], scale: float = 1.0) -> float:
    """Return the probability, at most, of guesses as right as these if the ledgers are true, but
    for so many times the noise; over all choices of how many to guess."""
    curves = [trade_off(with_steps_added(_scaled(each.spent, scale))) for each in repetitions]
    choices = [
        combined([p_value(each, curve) for each, curve in zip(choice, curves, strict=True)])
        for choice in zip(*(each.outcomes for each in repetitions), strict=True)
    ]
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


def combined(p_values: Sequence[float]) -> float:
    """Return the p-value of all; each alone is at most ``x`` with probability at most ``x``,
    whatever the others are."""
    count = len(p_values)
    ranks = np.arange(1, count + 1)
    levels = betainc(ranks, count - ranks + 1, np.sort(p_values))
    return _any_below(betaincinv(ranks, count - ranks + 1, float(levels.min())))


def _any_below(bounds: Array) -> float:
    """Probability that some ``j``-th smallest of so many uniform numbers is below its bound."""
    count, before, found = len(bounds), 0.0, 0.0
    numbers = np.arange(count + 1)  # below the last bound
    well = (numbers == 0).astype(float)
    for j, bound in enumerate(bounds.tolist()):
        share = (bound - before) / (1 - before) if before < 1 else 1.0
        moves = binom.pmf(numbers - numbers[:, None], count - numbers[:, None], share)
        moved = well @ moves
        found += float(moved[j + 1 :].sum())
        well = np.where(numbers <= j, moved, 0.0)
        before = bound
    return min(1.0, found)


@dataclass(frozen=True)
class TradeOff:
    """The curve, by its inverse, which is convex and made of straight pieces."""

    found: Array
    """Rates of true finds at the ends of the pieces, rising from 0 to 1."""
    false_alarms: Array
    """The least rate of false alarms that goes with each."""

    def least_false_alarms(self, found: Array) -> Array:
        """Return the least rate of false alarms of a test that finds so much; beyond 1: beyond 1,
        so that what is impossible stays so."""
        inside = np.interp(found, self.found, self.false_alarms)
        return np.where(found > 1, np.maximum(found, inside), inside)


@lru_cache(maxsize=64)
def trade_off(spent: tuple[DpEvent, ...]) -> TradeOff:
    """Return the curve of everything that was spent together, in either direction (a record added,
    a record removed)."""
    return trade_off_of(*privacy_curve(spent, EPSILONS, FINEST))


def trade_off_of(epsilons: Array, deltas: Array) -> TradeOff:
    """Return the curve of a mechanism that is ``(epsilon, delta)``-private for every pair, epsilon
    0 or more."""
    shrink = np.exp(-epsilons)
    # found <= delta + e^eps false, and the same with finds and false alarms in each other's place
    slopes = np.concatenate([shrink, 1 / shrink])
    offsets = np.concatenate([-shrink * deltas, (1 - deltas) - 1 / shrink])
    corners = _upper_envelope(slopes, offsets)
    return TradeOff(np.array([x for x, _ in corners]), np.array([y for _, y in corners]))


def _upper_envelope(slopes: Array, offsets: Array) -> list[tuple[float, float]]:
    """Corners, from 0 to 1, of the largest of straight lines and zero."""
    order = np.lexsort((offsets, slopes))
    lines: list[tuple[float, float]] = [(0.0, 0.0)]
    for slope, offset in zip(slopes[order].tolist(), offsets[order].tolist(), strict=True):
        if lines[-1][0] == slope:
            if lines[-1][1] >= offset:
                continue
            lines.pop()
        while len(lines) > 1 and _cross(lines[-2], (slope, offset)) <= _cross(lines[-2], lines[-1]):
            lines.pop()
        lines.append((slope, offset))
    inner = [x for x in map(_cross, lines, lines[1:]) if 0 < x < 1]
    ends = [0.0, *inner, 1.0]
    return [(x, max(slope * x + offset for slope, offset in lines)) for x in ends]


def _cross(left: tuple[float, float], right: tuple[float, float]) -> float:
    return (left[1] - right[1]) / (right[0] - left[0])


def p_value(guessed: Guesses, curve: TradeOff) -> float:
    """Return the probability, at most, of so many right guesses or more under the curve.

    Raises:
        ValueError: numbers that do not fit together.
    """
    canaries, guesses, correct = guessed.canaries, guessed.guesses, guessed.correct
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"{correct} right of {guesses} guesses about {canaries} canaries")
    if correct == 0:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(ROUNDS):
        tried = np.linspace(low, high, CANDIDATES + 1)[1:]
        possible = _possible(canaries, guesses, correct, tried, curve)
        if possible.all():
            return high
        first = int(np.argmin(possible))
        low, high = (low if first == 0 else float(tried[first - 1])), float(tried[first])
    return high


def _possible(m: int, r: int, c: int, tails: Array, curve: TradeOff) -> NDArray[np.bool_]:
    """Which values of ``P(C >= c)`` the inequalities allow."""
    right, wrong = tails * c / m, tails * (r - c) / m
    whole = r / m * (1 + 1e-12)
    possible = right + wrong <= whole
    for i in range(c - 1, -1, -1):
        # the inequality for t = i + 1 may need mass at i
        missing = np.maximum(curve.least_false_alarms(right) - wrong, 0.0)
        if not missing.any():
            break
        # beyond 1 it is impossible already: no need to know by how much
        missing = np.minimum(missing, 1.0)
        wrong = np.minimum(wrong + missing, 2.0)
        right = np.minimum(right + missing * i / (r - i), 2.0)
        possible &= right + wrong <= whole
        if not possible.any():
            break
    return possible
