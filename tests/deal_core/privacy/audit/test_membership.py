"""The membership attack's figures: known cases, intervals that cover, and what nobody can know."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from deal_core.privacy.audit.membership import area, membership, true_positive_rate


def test_known_areas():
    assert area(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 1.0
    assert area(np.array([1.0, 2.0]), np.array([3.0, 4.0])) == 0.0
    assert area(np.ones(5), np.ones(7)) == 0.5
    assert area(np.array([1.0, 3.0]), np.array([2.0])) == 0.5


def test_at_most_one_in_a_hundred_others_passes():
    rng = np.random.default_rng(0)
    members, others = rng.normal(1, 1, 50_000), rng.normal(0, 1, 50_000)
    expected = norm.sf(norm.isf(0.01) - 1)
    assert true_positive_rate(members, others) == pytest.approx(expected, abs=0.01)
    assert true_positive_rate(others, others) <= 0.01
    assert true_positive_rate(np.ones(100), np.ones(100)) == 0.0


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    truth = norm.cdf(0.5 / np.sqrt(2))
    found = [
        membership(rng.normal(0.5, 1, 150), rng.normal(0, 1, 99), k, resamples=150).auc
        for k in range(40)
    ]
    covered = sum(each.low <= truth <= each.high for each in found)
    assert covered >= 34
    assert max(each.high - each.low for each in found) < 0.2


def test_one_percent_of_fewer_than_a_hundred_is_not_told():
    rng = np.random.default_rng(2)
    assert membership(rng.normal(size=50), rng.normal(size=99), 0).true_positives is None
    assert membership(rng.normal(size=50), rng.normal(size=100), 0).true_positives is not None
    with pytest.raises(ValueError, match="0 members"):
        membership(np.zeros(0), np.zeros(3), 0)
