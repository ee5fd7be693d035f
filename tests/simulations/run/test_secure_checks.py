"""Experiments that need to see single updates, or hide nothing in a sum, are refused by name."""

from __future__ import annotations

import pytest

from deal_core.errors import UserError
from simulations.run.preflight import check_names
from tests.simulations.run.secure_runs import POOLED

SECURE = ("aggregation.secure=true", "federation.clients=4")


def test_every_rule_that_is_a_mean_of_factors_can_be_summed(make_experiment):
    for rule in ("fedit", "ffa"):
        check_names(make_experiment(*SECURE, f"aggregation.rule={rule}"))
    check_names(make_experiment(*SECURE, *POOLED))


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("aggregation.rule=flora", "rule 'flora' is no mean of factors; use fedit"),
        ("aggregation.rule=fedex", "rule 'fedex'"),
        ("aggregation.robust=cosine-norm", "'cosine-norm' judges single updates"),
        ("wire.dtype=int8", "set wire.dtype to float32"),
        ("federation.clients=2", "each knows the other's part"),
        ("federation.clients_per_round=2", "each knows the other's part"),
        ("federation.participants=[0, 1]", "each knows the other's part"),
        ("stream.joins={3=1, 2=1}", "each knows the other's part"),
        ("aggregation.min_cohort=5", "min_cohort is 5, and a round has 4 clients"),
        ("privacy.colluding=3", "leaves no two whose parts"),
        ("faults.scaled=[1]", "cannot be spoilt"),
    ],
)
def test_what_needs_single_updates_is_refused_with_the_reason(make_experiment, override, line):
    with pytest.raises(UserError, match=line) as refused:
        check_names(make_experiment(*SECURE, override))
    assert "\n" not in str(refused.value)
