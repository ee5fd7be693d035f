"""Verdict and lower bound: against a solver, and against mechanisms that are exact."""

from itertools import pairwise

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import linprog

from deal_core.privacy.accountant import DpEvent, epsilon_of, privacy_curve
from simulations.audit.claim import (
    CHOICES,
    EPSILONS,
    Guesses,
    Repetition,
    claim_p_value,
    combined,
    guess,
    lower_bound,
    p_value,
    trade_off,
    trade_off_of,
)
from tests.slow import slow_but


def solved(m, r, c, epsilons, deltas):
    """The largest ``P(C >= c)`` by a linear program: every inequality, every line of the curve."""
    i = np.arange(r + 1)
    rows, limits = [], []
    for t in range(1, r + 1):
        left = np.where(i >= t, i / m, 0)
        right = np.where(i >= t - 1, (r - i) / m, 0)
        for epsilon, delta in zip(epsilons, deltas, strict=True):
            rows.append(left - np.exp(epsilon) * right)
            limits.append(delta)
            rows.append(left - np.exp(-epsilon) * right)  # epsilon below zero
            limits.append(1 - np.exp(-epsilon) * (1 - delta))
    found = linprog(
        -(i >= c).astype(float), rows, limits, np.ones((1, r + 1)), [1.0], bounds=(0, 1)
    )
    assert found.success
    return -found.fun


@pytest.mark.parametrize("spent", [DpEvent(1.0, 2.0, 1), DpEvent(0.2, 0.8, 5)])
@pytest.mark.parametrize(("m", "r"), [(6, 6), (25, 20)])
def test_it_is_what_a_solver_finds(spent, m, r):
    chosen = EPSILONS[EPSILONS < 12][:: len(EPSILONS) // 12]  # which a solver can still scale
    epsilons, deltas = privacy_curve([spent], chosen, 1e-5)
    curve = trade_off_of(epsilons, deltas)
    for c in range(r // 2, r + 1):
        expected = solved(m, r, c, epsilons, deltas)
        assert 0 <= p_value(Guesses(m, r, c), curve) - expected + 1e-7 < 1e-3


def gaussian(sigma, m, rng):
    coins = rng.random(m) < 0.5
    return guess(coins + sigma * rng.normal(size=m), coins)


@pytest.mark.parametrize("sigma", slow_but([0.6, 3.7], 0.6))
def test_of_an_exact_mechanism_it_is_seldom_small(sigma):
    """Never below alpha more often than alpha, for any choice of guesses; the single best choice
    of every audit is not looked at here."""
    rng = np.random.default_rng(5)
    curve = trade_off((DpEvent(1.0, sigma, 1),))
    trials = 200
    drawn = [gaussian(sigma, 120, rng) for _ in range(trials)]
    for choice in range(len(CHOICES)):
        known = {g: p_value(g, curve) for d in drawn for g in d}
        p = np.array([known[d[choice]] for d in drawn])
        for alpha in (0.05, 0.2, 0.5):
            assert (p <= alpha).sum() <= stats.binom.ppf(0.999, trials, alpha)


def leaky(m, r, leak, rng):
    """With probability ``leak`` all is told, otherwise nothing: (0, leak)-private."""
    right = r if rng.random() < leak else int(rng.binomial(r, 0.5))
    return Guesses(m, r, right)


def test_a_mechanism_that_seldom_tells_all_is_not_refuted_by_one_run():
    """What one run cannot tell from a leak: the p-value is as large as the leak, not smaller."""
    curve = trade_off_of(np.array([0.0]), np.array([0.1]))
    assert p_value(Guesses(500, 500, 500), curve) >= 0.1
    rng = np.random.default_rng(0)
    p = [p_value(leaky(500, 500, 0.1, rng), curve) for _ in range(300)]
    assert np.mean(np.array(p) <= 0.1) <= stats.binom.ppf(0.999, 300, 0.1) / 300


def test_it_moves_with_the_guesses_and_with_the_noise():
    curve = trade_off((DpEvent(1.0, 1.0, 1),))
    falling = [p_value(Guesses(200, 100, c), curve) for c in range(0, 101, 5)]
    assert all(a >= b for a, b in pairwise(falling))
    assert falling[0] == 1.0
    said = Guesses(200, 100, 90)
    by_noise = [p_value(said, trade_off((DpEvent(1.0, s, 1),))) for s in (0.4, 0.8, 1.6)]
    assert by_noise == sorted(by_noise, reverse=True)
    with pytest.raises(ValueError, match="right of 11 guesses"):
        p_value(Guesses(10, 11, 5), curve)


def repetitions(sigma, real, count, m, rng):
    spent = (DpEvent(1.0, sigma, 1),)
    return [Repetition(spent=spent, outcomes=gaussian(real * sigma, m, rng)) for _ in range(count)]


@pytest.mark.parametrize(  # the last two: epsilon 8 and 1 at delta 1e-5
    ("sigma", "count", "m"),
    [(1.5, 4, 400), *(pytest.param(s, 6, 1000, marks=pytest.mark.slow) for s in (0.6, 3.73))],
)
def test_repetitions_refute_half_the_noise_and_bound_it(sigma, count, m):
    rng = np.random.default_rng(2)
    weak = repetitions(sigma, 0.5, count, m, rng)
    assert claim_p_value(weak) < 0.01
    assert 0.5 < lower_bound(weak, 1e-5).scale < 1
    honest = repetitions(sigma, 1.0, count, m, rng)
    assert claim_p_value(honest) > 0.05
    bound, claimed = lower_bound(honest, 1e-5), epsilon_of([DpEvent(1.0, sigma, 1)], 1e-5)
    assert bound.scale > 1
    assert 0.5 * claimed < bound.epsilon < claimed


def test_an_honest_mechanism_is_refuted_in_at_most_one_of_twenty_audits():
    """Over all choices and repetitions: what the command's verdict rests on."""
    rng = np.random.default_rng(3)
    trials = 150
    refuted = sum(claim_p_value(repetitions(1.0, 1.0, 4, 250, rng)) < 0.05 for _ in range(trials))
    assert refuted <= stats.binom.ppf(0.999, trials, 0.05)


@pytest.mark.parametrize("count", slow_but([2, 12], 2))
def test_p_values_of_uniform_repetitions_are_uniform_together(count):
    rng = np.random.default_rng(count)
    found = [combined(rng.random(count)) for _ in range(1000)]
    assert stats.kstest(found, "uniform").pvalue > 1e-3


def test_all_fairly_small_tell_much_and_one_very_small_something():
    assert combined([0.03]) == pytest.approx(0.03)
    assert combined([0.4] * 8) < 0.01
    assert combined([1e-6, *[1.0] * 7]) < 1e-4
    assert combined([1.0] * 8) == pytest.approx(1.0)
    assert combined([0.6] * 8) > combined([0.5] * 8) > combined([0.5] * 7 + [1e-4])


@pytest.mark.parametrize(
    ("scores", "included"), [([], []), ([1.0, 2.0], [True]), ([np.nan, 1.0], [True, False])]
)
def test_what_is_no_audit_is_refused(scores, included):
    with pytest.raises(ValueError, match=r"scores for|not a number"):
        guess(np.array(scores), np.array(included))


@pytest.mark.parametrize("m", [2, 3, 50])
def test_no_canary_is_guessed_twice(m):
    every = guess(np.arange(m), np.arange(m) % 2 == 0)
    assert len(every) == len(CHOICES)
    assert all(each.correct <= each.guesses <= m for each in every)
    best = guess(np.arange(4.0), np.array([False, False, True, True]))[2]
    assert (best.guesses, best.correct) == (4, 4)


def test_few_coins_refute_nothing():
    rng = np.random.default_rng(0)
    spent = (DpEvent(1.0, 0.6, 1),)
    bound = lower_bound([Repetition(spent=spent, outcomes=gaussian(0.6, 4, rng))], 1e-5)
    assert (bound.epsilon, bound.scale) == (0.0, None)


@pytest.mark.parametrize("sigma", [0.5, 4.0])
def test_the_curve_of_a_gaussian_mechanism(sigma):
    false_alarms = np.linspace(0.001, 0.999, 200)
    found = stats.norm.sf(stats.norm.isf(false_alarms) - 1 / sigma)
    ours = trade_off((DpEvent(1.0, sigma, 1),)).least_false_alarms(found)
    assert (ours <= false_alarms + 1e-9).all()  # never asks for more than is so
    assert np.abs(ours - false_alarms).max() < 1e-3


def test_the_curve_of_one_sampled_step_is_that_of_either_direction():
    """A record there against away: the mixture; away against there: its mirror image."""
    q, sigma = 0.3, 0.7
    thresholds = np.linspace(-4, 5, 400)
    away, there = stats.norm.sf(thresholds / sigma), stats.norm.sf((thresholds - 1) / sigma)
    mixed = (1 - q) * away + q * there
    curve = trade_off((DpEvent(q, sigma, 1),))
    assert (curve.least_false_alarms(mixed) <= away + 1e-9).all()
    assert (curve.least_false_alarms(1 - away) <= 1 - mixed + 1e-9).all()
    # the better direction is reached
    assert np.abs(curve.least_false_alarms(mixed) - away)[away < 0.05].max() < 1e-3


def test_the_curve_of_pure_privacy_and_of_a_leak():
    pure = trade_off_of(np.array([1.0]), np.array([0.0]))
    assert pure.least_false_alarms(np.array([0.5]))[0] == pytest.approx(0.5 / np.e)
    assert pure.least_false_alarms(np.array([0.9]))[0] == pytest.approx(1 - 0.1 * np.e)
    leak = trade_off_of(np.array([0.0]), np.array([0.1]))
    assert leak.least_false_alarms(np.array([0.1]))[0] == pytest.approx(0.0)
    assert leak.least_false_alarms(np.array([0.5]))[0] == pytest.approx(0.4)


def test_what_is_too_little_noise_for_the_grid_promises_nothing():
    curve = trade_off((DpEvent(0.05, 0.02, 200),))
    assert not curve.least_false_alarms(np.array([0.0, 0.5, 0.99])).any()
