"""Several p-values in one: exact for uniform ones, and it rises with each."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from deal_core.privacy.audit.repetitions import combined


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_of_uniform_ones_it_is_uniform(count):
    rng = np.random.default_rng(count)
    found = [combined(rng.random(count)) for _ in range(1000)]
    assert stats.kstest(found, "uniform").pvalue > 1e-3


def test_of_one_it_is_that_one():
    for p in (1e-6, 0.03, 0.5, 1.0):
        assert combined([p]) == pytest.approx(p)


def test_all_fairly_small_tell_much_and_one_very_small_something():
    assert combined([0.4] * 8) < 0.01
    assert combined([1e-6, *[1.0] * 7]) < 1e-4
    assert combined([1.0] * 8) == pytest.approx(1.0)
    assert combined([0.6] * 8) > combined([0.5] * 8) > combined([0.5] * 7 + [1e-4])


def test_none_is_refused():
    with pytest.raises(ValueError, match="no p-value"):
        combined([])
