"""Limits of a site's policy that an experiment passes on either side; the name of a run."""

from __future__ import annotations

import re

import pytest

from deal_core.config.experiment import PrivacyConfig
from deal_core.config.run_config import run_name
from deal_core.errors import UserError
from deal_core.privacy.policy import Policy, default_delta, terms


def test_a_largest_delta_takes_the_place_of_the_default_also_where_it_is_larger():
    asks = PrivacyConfig(mechanism="record", target_delta=0.01)
    assert terms(asks, Policy(max_delta=0.005), 1000)[1] == 0.005
    for policy in (None, Policy()):
        with pytest.raises(UserError, match=r"too large for 1000 records.*0\.0001 or less"):
            terms(asks, policy, 1000)


@pytest.mark.parametrize("units", [0, 1, 2, 9, 10, 11, 99, 100, 1000, 1001, 123456, 10**7])
def test_the_default_delta_times_the_number_of_records_is_a_tenth_at_most(units):
    delta = default_delta(units)
    assert units * delta <= 0.1 < 10 * max(units, 2) * delta + 1e-12
    terms(PrivacyConfig(mechanism="record", target_delta=delta), None, units)


def test_the_name_is_the_whole_digest_and_another_for_other_settings(make_experiment):
    names = {
        run_name(make_experiment(*changed))
        for changed in ((), ("run.seed=1",), ("train.learning_rate=0.02",), ("adapter.rank=4",))
    }
    assert len(names) == 4
    assert all(re.fullmatch("[0-9a-f]{64}", name) for name in names)
