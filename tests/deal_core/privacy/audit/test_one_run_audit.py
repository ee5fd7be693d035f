"""The lower bound holds as often as it says, is not empty, and moves the right way."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from deal_core.privacy.audit.guesses import CHOICES, Guesses, guess
from deal_core.privacy.audit.one_run_audit import lower_bound, p_value


def audit(scores, included, delta: float):
    """Of one run."""
    return lower_bound([guess(scores, included)], delta)


def refuted_epsilon(m: int, r: int, v: int, delta: float) -> float:
    """Of one run and one choice of guesses."""
    return lower_bound([[Guesses(m, r, v)]], delta).epsilon


def randomised_response(epsilon: float, m: int, rng: np.random.Generator):
    """The mechanism for which the bound is exact: each coin is told rightly with probability
    ``e^epsilon / (1 + e^epsilon)``, and nothing else leaves."""
    included = rng.random(m) < 0.5
    told = included ^ (rng.random(m) >= 1 / (1 + math.exp(-epsilon)))
    order = rng.random(m)  # ties in an order that knows nothing
    return told + 0.5 * order, included


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 3.0])
def test_above_the_truth_in_at_most_five_of_a_hundred_audits(epsilon):
    rng = np.random.default_rng(7)
    trials = 400
    bounds = [
        audit(*randomised_response(epsilon, 400, rng), delta=0.0).epsilon for _ in range(trials)
    ]
    above = sum(bound > epsilon for bound in bounds)
    # 99.9 % of what a true rate of 5 % would give
    assert above <= stats.binom.ppf(0.999, trials, 0.05)
    if epsilon:
        assert np.median(bounds) > 0.6 * epsilon


def test_one_choice_of_guesses_is_exact():
    """Without the correction for several choices: the error is used up, not only kept."""
    rng = np.random.default_rng(3)
    m, epsilon, trials = 1000, 1.0, 2000
    correct = rng.binomial(m, 1 / (1 + math.exp(-epsilon)), trials)
    rejected = np.mean([p_value(m, m, int(v), epsilon, 0.0) < 0.05 for v in correct])
    assert 0.035 < rejected < 0.06


def gaussian(mu: float, m: int, rng: np.random.Generator):
    included = rng.random(m) < 0.5
    return mu * included + rng.normal(size=m), included


def test_stays_below_the_gaussian_mechanisms_epsilon_and_comes_near():
    """``mu = 1``: epsilon is 4.38 at delta = 1e-5 (analytic Gaussian mechanism)."""
    rng = np.random.default_rng(11)
    bounds = [audit(*gaussian(1.0, 2000, rng), delta=1e-5).epsilon for _ in range(20)]
    assert max(bounds) < 4.38
    assert np.median(bounds) > 0.8


def test_the_p_value_moves_with_every_argument():
    rising = [p_value(200, 100, 80, e, 1e-5) for e in np.linspace(0, 4, 40)]
    assert all(a <= b + 1e-12 for a, b in pairwise(rising))
    falling = [p_value(200, 100, v, 1.0, 1e-5) for v in range(50, 101)]
    assert all(a >= b - 1e-12 for a, b in pairwise(falling))
    by_delta = [p_value(200, 100, 90, 1.0, d) for d in (0, 1e-6, 1e-4, 1e-2)]
    assert by_delta == sorted(by_delta)
    assert by_delta[0] < by_delta[-1]
    bounds = [refuted_epsilon(200, 100, v, 1e-5) for v in range(0, 101)]
    assert bounds == sorted(bounds)
    assert bounds[50] == 0
    assert bounds[-1] > 3


def test_pure_case_is_the_binomial_tail():
    assert p_value(10, 10, 10, 0.0, 0.0) == pytest.approx(2**-10)
    assert p_value(10, 10, 0, 5.0, 0.1) == 1.0
    # m right guesses of m refute exactly the epsilon with q^m = error
    q = 0.05 ** (1 / 100)
    assert refuted_epsilon(100, 100, 100, 0.0) == pytest.approx(math.log(q / (1 - q)), rel=1e-6)


def test_delta_counts_as_the_source_counts_it():
    """The source's own loop, word by word."""
    m, r, v, epsilon, delta = 300, 120, 100, 1.2, 3e-4
    q = 1 / (1 + math.exp(-epsilon))
    alpha = total = 0.0
    for i in range(1, v + 1):
        total += stats.binom.pmf(v - i, r, q)
        alpha = max(alpha, total / i)
    expected = stats.binom.sf(v - 1, r, q) + alpha * delta * 2 * m
    assert p_value(m, r, v, epsilon, delta) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("scores", "included"),
    [([], []), ([1.0, 2.0], [True]), ([math.nan, 1.0], [True, False])],
)
def test_what_is_no_audit_is_refused(scores, included):
    with pytest.raises(ValueError, match=r"scores for|not a number"):
        audit(scores, included, delta=1e-5)


@pytest.mark.parametrize("m", [2, 3, 7, 50])
def test_no_canary_is_guessed_twice(m):
    every = guess(np.arange(m), np.arange(m) % 2 == 0)
    assert len(every) == len(CHOICES)
    assert all(each.correct <= each.guesses <= m for each in every)
    best = guess([0.0, 1.0, 2.0, 3.0], [False, False, True, True])[2]
    assert (best.guesses, best.correct) == (4, 4)


def test_repetitions_show_more_and_stay_below_the_truth():
    """``mu = 1``: epsilon is 4.38 at delta = 1e-5."""
    rng = np.random.default_rng(4)
    many = [[guess(*gaussian(1.0, 1000, rng)) for _ in range(8)] for _ in range(10)]
    bounds = [lower_bound(each, 1e-5).epsilon for each in many]
    alone = [lower_bound(each[:1], 1e-5).epsilon for each in many]
    assert max(bounds) < 4.38
    assert np.median(bounds) > np.median(alone) + 0.2


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match="right of 11 guesses"):
        p_value(10, 11, 5, 1.0, 0.0)
    with pytest.raises(ValueError, match="no such guarantee"):
        p_value(10, 5, 5, -1.0, 0.0)
