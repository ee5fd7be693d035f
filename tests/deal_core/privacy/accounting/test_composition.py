"""The epsilon of composed releases, against accountants that share no line with ours."""

from __future__ import annotations

import math
import warnings

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from deal_core.privacy.accountant import (
    ORDERS,
    DpEvent,
    epsilon_of,
    renyi,
    with_steps_added,
)

DELTA = 1e-5
MIXED = [(0.064, 1.0, 160), (0.128, 1.0, 80), (0.08, 1.0, 130), (0.05, 1.0, 200), (0.06, 1.0, 170)]

GOOGLE = [
    ([(0.064, 1.0, 160)], 5.553341700735953),
    (MIXED, 14.335187712072715),
    ([(0.1, 3.0, 5000)], 12.753934126104333),
    ([(1.0, 2.0, 10)], 7.511275931182365),
    ([(1.0, 5.0, 6), (0.05, 1.0, 200)], 5.24229264363201),
    ([(0.2, 0.5, 50)], 38.675712258380045),
    ([(0.01, 20.0, 3000)], 0.08331096832312264),
]
"""Made with dp-accounting 0.6.0 (add-or-remove-one, PLD, its default grid of 1e-4):

    accountant = dp_accounting.pld.PLDAccountant()
    for rate, multiplier, steps in events:
        gaussian = dp_accounting.GaussianDpEvent(multiplier)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, gaussian), steps)
    accountant.get_epsilon(1e-5)
"""


def spent(events) -> list[DpEvent]:
    return [DpEvent(*event) for event in events]


@pytest.mark.parametrize(("events", "expected"), GOOGLE)
def test_equals_googles_privacy_loss_distributions(events, expected):
    assert epsilon_of(spent(events), DELTA) == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize("events", [MIXED[:2], [(0.02, 0.7, 500)], [(0.3, 4.0, 40)]])
def test_equals_opacus_prv_within_one_percent(events):
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(multiplier, rate, steps) for rate, multiplier, steps in events]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = accountant.get_epsilon(DELTA, eps_error=0.005)
    assert epsilon_of(spent(events), DELTA) == pytest.approx(expected, rel=0.01)


def closed_form(multiplier: float, steps: int, delta: float) -> float:
    """Balle & Wang, ICML 2018: composed Gaussians are one with mean ``sqrt(steps) / sigma``."""
    mu = math.sqrt(steps) / multiplier

    def excess(epsilon: float) -> float:
        upper = norm.cdf(mu / 2 - epsilon / mu)
        return upper - math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu)) - delta

    return brentq(excess, 0, 100)


@pytest.mark.parametrize(("multiplier", "steps"), [(244.0, 10**6), (250.0, 10**6), (3000.0, 10**6)])
@pytest.mark.parametrize("delta", [1e-10, 1e-9, 1e-6])
def test_rounding_of_a_million_steps_makes_no_epsilon_too_small(multiplier, steps, delta):
    ours = epsilon_of([DpEvent(1.0, multiplier, steps)], delta)
    assert closed_form(multiplier, steps, delta) <= ours * (1 + 1e-9) < 100


@pytest.mark.parametrize(("multiplier", "steps"), [(1.0, 1), (3.0, 7), (10.0, 200)])
@pytest.mark.parametrize("delta", [1e-8, 1e-5, 1e-2])
def test_without_sampling_it_is_the_closed_form_of_one_gaussian(multiplier, steps, delta):
    expected = closed_form(multiplier, steps, delta)
    ours = epsilon_of([DpEvent(1.0, multiplier, steps)], delta)
    assert expected <= ours * (1 + 1e-9)
    assert ours == pytest.approx(expected, rel=0.003)


@pytest.mark.parametrize("events", [events for events, _ in GOOGLE])
def test_never_above_the_bound_by_renyi_divergence(events):
    bound = (renyi(spent(events)) + math.log(1 / DELTA) / (ORDERS - 1)).min()
    assert epsilon_of(spent(events), DELTA) <= bound


def test_grows_with_everything_that_is_spent_and_falls_with_noise():
    base = epsilon_of([DpEvent(0.1, 1.0, 50)], DELTA)
    assert epsilon_of([DpEvent(0.1, 1.0, 51)], DELTA) > base
    assert epsilon_of([DpEvent(0.11, 1.0, 50)], DELTA) > base
    assert epsilon_of([DpEvent(0.1, 1.05, 50)], DELTA) < base
    assert epsilon_of([DpEvent(0.1, 1.0, 50)], DELTA / 10) > base
    assert epsilon_of([DpEvent(0.1, 1.0, 50), DpEvent(0.01, 4.0, 1)], DELTA) >= base
    assert epsilon_of([], DELTA) == 0.0


def test_order_and_cutting_play_no_part():
    whole = [DpEvent(0.1, 1.0, 50), DpEvent(0.2, 2.0, 10)]
    cut = [DpEvent(0.2, 2.0, 4), DpEvent(0.1, 1.0, 50), DpEvent(0.2, 2.0, 6)]
    assert with_steps_added(whole) == with_steps_added(cut)
    assert epsilon_of(whole, DELTA) == epsilon_of(cut, DELTA)


@pytest.mark.parametrize("delta", [0.0, 1.0, 1e-12])
def test_a_delta_that_means_nothing_is_refused(delta):
    with pytest.raises(ValueError, match="delta"):
        epsilon_of([DpEvent(0.1, 1.0, 1)], delta)


@pytest.mark.parametrize("fault", [(0.0, 1.0, 1), (1.1, 1.0, 1), (0.1, 0.0, 1), (0.1, 1.0, 0)])
def test_what_is_no_mechanism_is_refused(fault):
    with pytest.raises(ValueError, match="no such mechanism"):
        DpEvent(*fault)


@pytest.mark.parametrize("noise", [0.03, 0.05, 0.1])
def test_noise_too_weak_for_the_grid_is_bounded_without_a_warning(noise: float) -> None:
    event = DpEvent(0.1, noise, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        epsilon = epsilon_of([event], 1e-5)
    whole = DpEvent(0.1, noise, 1)
    assert epsilon_of([whole], 1e-5) < epsilon < math.inf
