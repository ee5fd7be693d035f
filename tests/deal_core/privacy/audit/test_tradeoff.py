"""The trade-off curve: known mechanisms, and never above the truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from deal_core.privacy.accountant import DpEvent
from deal_core.privacy.audit.tradeoff import trade_off, trade_off_of

FALSE_ALARMS = np.linspace(0.001, 0.999, 200)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 4.0])
def test_of_a_gaussian_mechanism(sigma):
    found = norm.sf(norm.isf(FALSE_ALARMS) - 1 / sigma)
    ours = trade_off([DpEvent(1.0, sigma, 1)]).least_false_alarms(found)
    assert (ours <= FALSE_ALARMS + 1e-9).all()  # never asks for more than is so
    assert np.abs(ours - FALSE_ALARMS).max() < 1e-3


def test_of_one_sampled_step_it_is_that_of_either_direction():
    """A record there against away: the mixture; away against there: its mirror image."""
    q, sigma = 0.3, 0.7
    thresholds = np.linspace(-4, 5, 400)
    away, there = norm.sf(thresholds / sigma), norm.sf((thresholds - 1) / sigma)
    mixed = (1 - q) * away + q * there
    curve = trade_off([DpEvent(q, sigma, 1)])
    assert (curve.least_false_alarms(mixed) <= away + 1e-9).all()
    assert (curve.least_false_alarms(1 - away) <= 1 - mixed + 1e-9).all()
    # the better direction is reached
    assert np.abs(curve.least_false_alarms(mixed) - away)[away < 0.05].max() < 1e-3


def test_of_pure_privacy_and_of_a_leak():
    pure = trade_off_of(np.array([1.0]), np.array([0.0]))
    assert pure.least_false_alarms(np.array([0.5]))[0] == pytest.approx(0.5 / np.e)
    assert pure.least_false_alarms(np.array([0.9]))[0] == pytest.approx(1 - 0.1 * np.e)
    leak = trade_off_of(np.array([0.0]), np.array([0.1]))
    assert leak.least_false_alarms(np.array([0.1]))[0] == pytest.approx(0.0)
    assert leak.least_false_alarms(np.array([0.5]))[0] == pytest.approx(0.4)


def test_what_is_too_little_noise_for_the_grid_promises_nothing():
    curve = trade_off([DpEvent(0.05, 0.02, 200)])
    assert not curve.least_false_alarms(np.array([0.0, 0.5, 0.99])).any()
