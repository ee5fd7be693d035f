"""The epsilon of composed releases, against other accountants; several runs at one site."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from deal_core.privacy.accountant import (
    ORDERS,
    DpEvent,
    adaptive_epsilon,
    epsilon_of,
    renyi,
    with_steps_added,
)
from deal_core.privacy.events import SET_ASIDE, Budget, BudgetSpent, composed, require_within
from deal_core.privacy.plan import PrivacyPlan, ReleaseSchedule, solve_noise_multiplier
from deal_core.privacy.policy import Policy
from tests.ledger_events import ledger_event
from tests.slow import slow_but

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


def spent(events):
    return [DpEvent(*event) for event in events]


@pytest.mark.parametrize(("events", "expected"), GOOGLE)
def test_our_grid_gives_what_googles_fine_one_does_and_no_more_than_renyi(events, expected):
    ours = epsilon_of(spent(events), DELTA)
    assert ours == pytest.approx(expected, rel=0.005)
    bound = (renyi(spent(events)) + math.log(1 / DELTA) / (np.array(ORDERS) - 1)).min()
    assert ours <= bound


@pytest.mark.parametrize("events", slow_but([MIXED[:2], [(0.02, 0.7, 500)]], MIXED[:2]))
def test_equals_opacus_prv_within_one_percent(events):
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(multiplier, rate, steps) for rate, multiplier, steps in events]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = accountant.get_epsilon(DELTA, eps_error=0.02)
    assert epsilon_of(spent(events), DELTA) == pytest.approx(expected, rel=0.01)


def closed_form(multiplier, steps, delta):
    """Balle & Wang, ICML 2018: composed Gaussians are one with mean ``sqrt(steps) / sigma``."""
    mu = math.sqrt(steps) / multiplier

    def excess(epsilon):
        upper = norm.cdf(mu / 2 - epsilon / mu)
        return upper - math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu)) - delta

    return brentq(excess, 0, 100)


@pytest.mark.parametrize(
    ("multiplier", "steps", "delta"),
    [
        (1.0, 1, 1e-8),
        (10.0, 200, 1e-5),
        (1000.0, 10**6, 1e-10),
        pytest.param(244.0, 10**6, 1e-2, marks=pytest.mark.slow),
    ],
)
def test_without_sampling_it_is_the_closed_form_of_one_gaussian(multiplier, steps, delta):
    expected = closed_form(multiplier, steps, delta)
    ours = epsilon_of([DpEvent(1.0, multiplier, steps)], delta)
    assert expected <= ours * (1 + 1e-9)
    assert ours == pytest.approx(expected, rel=0.005)


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


def test_what_is_no_mechanism_and_no_delta_is_refused():
    for fault in [(0.0, 1.0, 1), (1.1, 1.0, 1), (0.1, 0.0, 1), (0.1, 1.0, 0)]:
        with pytest.raises(ValueError, match="no such mechanism"):
            DpEvent(*fault)
    for delta in (0.0, 1.0, 1e-12):
        with pytest.raises(ValueError, match="delta"):
            epsilon_of([DpEvent(0.1, 1.0, 1)], delta)


@pytest.mark.parametrize("noise", [0.03, 0.1])
def test_noise_too_weak_for_the_grid_is_bounded_without_a_warning(noise):
    event = DpEvent(0.1, noise, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        epsilon = epsilon_of([event], 1e-5)
    whole = DpEvent(0.1, noise, 1)
    assert epsilon_of([whole], 1e-5) < epsilon < math.inf


POINTS = np.linspace(-12, 12, 8001)
"""Values of the released number, in units of its noise."""


def densities(event):
    """With the record and without, at :data:`POINTS`, of one step; each sums to 1."""
    places = POINTS * event.noise_multiplier
    without = norm.pdf(places, scale=event.noise_multiplier)
    shifted = norm.pdf(places, loc=1.0, scale=event.noise_multiplier)
    with_record = (1 - event.sample_rate) * without + event.sample_rate * shifted
    return with_record / with_record.sum(), without / without.sum()


def lost(event, epsilons):
    """Delta of one step at each epsilon, also below 0: a record more, by plain summation."""
    ours, others = densities(event)
    return np.array([np.maximum(ours - math.exp(e) * others, 0).sum() for e in epsilons])


def of_the_better_choice(first, choices, epsilon):
    """Delta of the whole at an epsilon, where the second step is chosen in sight of the first: of
    every outcome that choice under which most is lost."""
    ours, others = densities(first)
    losses = np.log(ours / others)
    left = np.linspace(losses.min(), losses.max(), 400)
    best = np.max([lost(each, epsilon - left) for each in choices], axis=0)
    return float((ours * np.interp(losses, left, best)).sum())


def second_steps(first, epsilon, whole):
    """One step after the first, of a low rate or of rate 1, each as large as the budget lets it."""
    found = []
    for rate in (1.0, 0.02):

        def spent(sigma, rate=rate):
            return whole([first, DpEvent(rate, sigma, 1)])

        found.append(DpEvent(rate, solve_noise_multiplier(spent, epsilon), 1))
    return found


@pytest.mark.parametrize("epsilon", slow_but([1.0, 2.0], 2.0))
def test_who_chooses_in_sight_of_a_release_gains_nothing(epsilon):
    """Against mechanisms that are fixed beforehand the choice loses more than either by itself; the
    sum for any choice is not passed."""
    first = DpEvent(1.0, 5.0 / epsilon, 1)
    fixed = second_steps(first, epsilon, lambda events: epsilon_of(events, DELTA))
    each = [of_the_better_choice(first, [one], epsilon) for one in fixed]
    assert max(each) <= DELTA * 1.05
    assert of_the_better_choice(first, fixed, epsilon) > 1.1 * max(each)
    safe = second_steps(first, epsilon, lambda events: adaptive_epsilon(events, DELTA))
    assert of_the_better_choice(first, safe, epsilon) <= DELTA


@pytest.mark.parametrize(
    ("event", "delta"), [(DpEvent(1.0, 4.0, 3), 1e-4), (DpEvent(0.01, 0.8, 500), 1e-6)]
)
def test_the_sum_for_any_choice_is_above_the_exact_one_and_not_far(event, delta):
    exact, safe = epsilon_of([event], delta), adaptive_epsilon([event], delta)
    assert exact <= safe <= 1.7 * exact
    part = event.steps // 3
    parts = [replace(event, steps=part), replace(event, steps=event.steps - part)]
    assert adaptive_epsilon(parts, delta) == pytest.approx(safe)
    assert adaptive_epsilon([], delta) == 0.0


@pytest.mark.parametrize(
    ("records", "epsilon", "dearer", "twice"),
    [(200, 2.0, 1.46, 2.1), pytest.param(1600, 2.0, 1.65, 2.1, marks=pytest.mark.slow)],
)
def test_what_a_second_run_costs_is_as_the_docs_say(records, epsilon, dearer, twice):
    """Batches of 16; ten epochs; shares of delta as a ledger has them."""
    steps = math.ceil(records / 16) * 10

    def exact(noise, runs=1):
        return epsilon_of([DpEvent(16 / records, noise, runs * steps)], 0.95e-5)

    noise = solve_noise_multiplier(exact, epsilon)
    once = adaptive_epsilon([DpEvent(16 / records, noise, steps)], 0.05e-5)
    both = adaptive_epsilon([DpEvent(16 / records, noise, 2 * steps)], 0.05e-5)
    assert exact(noise) < once <= dearer * epsilon
    assert exact(noise, 2) < both <= twice * epsilon


def test_one_run_composes_exactly_and_two_for_any_choice():
    event = ledger_event(sample_rate=0.1, noise_multiplier=1.5, steps=10)
    spent = [DpEvent(0.1, 1.5, 20)]
    together = composed([event, event], DELTA)
    assert together == epsilon_of(spent, (1 - SET_ASIDE) * DELTA)
    apart = composed([event, replace(event, run="another")], DELTA)
    assert apart == adaptive_epsilon(spent, SET_ASIDE * DELTA)
    assert together < apart < 2 * together


def test_a_run_has_no_more_rounds_of_a_task_than_it_has_planned():
    """Which task's rounds use the budget up would follow from what was released."""
    event = ledger_event(task="surgery")
    budget = Budget(100.0, DELTA, most=2)
    others = [replace(event, task="skin"), replace(event, run="another")]
    require_within([event, *others, event], budget)
    with pytest.raises(BudgetSpent, match="has 2 rounds of task 'surgery', and they are over"):
        require_within([event, event, *others, event], budget)


def test_less_than_was_planned_for_holds_for_any_choice():
    """A policy that becomes tighter in a run: which of its rounds use up the rest may follow from
    what was released."""
    work = ReleaseSchedule(task="surgery", records=100, rounds=2, sample_rate=0.1, steps=10)
    plan = PrivacyPlan(
        noise_multiplier=1.5,
        epsilon=4.0,
        delta=DELTA,
        disjoint_tasks=False,
        max_grad_norm=1.0,
        work=(work,),
        units=100,
    )
    assert not plan.budget(Policy(max_epsilon=4.0), 2).any_choice
    tighter = plan.budget(Policy(max_epsilon=3.0), 2)
    assert tighter == Budget(3.0, DELTA, most=2, any_choice=True)
    event = ledger_event(sample_rate=0.1, noise_multiplier=1.5, steps=10)
    exact, safe = (composed([event], DELTA, any_choice=any_choice) for any_choice in (False, True))
    require_within([event], Budget(exact, DELTA))
    with pytest.raises(BudgetSpent):
        require_within([event], Budget(exact, DELTA, any_choice=True))
    require_within([event], Budget(safe, DELTA, any_choice=True))
