import pytest
from scipy import stats

from simulations.study.statistics import estimate, paired_difference


def test_a_mean_with_its_interval_from_a_table_of_t():
    # t(0.975, 2) = 4.303; standard deviation 1, standard error 1 / sqrt(3)
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half_width == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert found.n == 3


def test_paired_differences_are_those_of_scipy_over_what_both_have():
    ours = {0: 0.81, 1: 0.79, 2: 0.84, 3: 0.80, 9: 0.1}
    theirs = {2: 0.80, 0: 0.80, 1: 0.75, 3: 0.79, 8: 0.9}
    found = paired_difference(ours, theirs)
    common = [0, 1, 2, 3]
    oracle = stats.ttest_rel([ours[k] for k in common], [theirs[k] for k in common])
    low, high = oracle.confidence_interval(0.95)
    assert found is not None
    assert found.n == 4
    assert found.p_value == pytest.approx(oracle.pvalue)
    assert found.mean == pytest.approx((low + high) / 2)
    assert found.half_width == pytest.approx((high - low) / 2)


def test_what_cannot_be_said_is_none():
    one = estimate([0.5])
    assert (one.mean, one.half_width, one.p_value, one.n) == (0.5, None, None, 1)
    equal = paired_difference({0: 0.3, 1: 0.7}, {0: 0.3, 1: 0.7})
    assert equal is not None
    assert (equal.mean, equal.half_width, equal.p_value) == (0.0, None, None)
    assert paired_difference({0: 0.1}, {1: 0.1}) is None
