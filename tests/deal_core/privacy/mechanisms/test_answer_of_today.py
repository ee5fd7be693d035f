"""A charged answer that a ledger keeps, when the site's policy of today is stricter."""

from __future__ import annotations

import pytest

from deal_core.privacy.interface import Refusal, Site, release
from deal_core.privacy.ledger import Ledger
from deal_core.privacy.policy import Policy
from deal_core.protection import make_mechanism
from tests.deal_core.privacy.mechanisms.test_record_mechanism import Maker, ask, count, experiment


def site_at(folder, **policy):
    return Site(lambda: Ledger(folder), Policy(**policy), simulated=False)


def test_noised_counts_that_were_kept_stay_where_the_budget_is_smaller_today(tmp_path):
    asks = ("privacy.metrics=noised", "privacy.target_epsilon=20")
    mechanism = make_mechanism(experiment(*asks, "federation.rounds=2"))
    counts = {"correct": [7] * 5, "examples": [10] * 5, "correct_all": [6] * 5}
    lax = site_at(tmp_path, mechanism="record", metrics="noised")
    first = count(mechanism, lax, 0, lambda: counts)
    assert count(mechanism, lax, 0, lambda: counts) == first  # once, and the same again
    strict = site_at(tmp_path, mechanism="record", metrics="noised", max_epsilon=0.1)
    with pytest.raises(Refusal) as refused:
        count(mechanism, strict, 0, lambda: counts)
    assert refused.value.code == "withheld"
    assert len(lax.ledger().events()) == 1


def test_a_declaration_that_the_site_has_withdrawn_is_told_with_no_kept_update(tmp_path):
    alone = "method.prototype.enabled=off"  # the budget is that of the updates
    mechanism = make_mechanism(experiment("federation.rounds=1", alone))
    limits = {"mechanism": "record", "max_epsilon": 1.0}
    for number in range(5):
        told = release(
            mechanism, ask(f"task{number}", 1), site_at(tmp_path, **limits, disjoint_tasks=True),
            Maker(),
        )  # fmt: skip
    assert told.figures["disjoint_tasks"] == 1.0
    with pytest.raises(Refusal) as refused:  # of a record in all five tasks more is spent
        release(mechanism, ask("task4", 1), site_at(tmp_path, **limits), Maker())
    assert refused.value.code == "budget-spent"


def test_a_kept_update_tells_the_spending_of_today(tmp_path):
    mechanism, site = make_mechanism(experiment("federation.rounds=1")), site_at(tmp_path)
    first = release(mechanism, ask("task0", 1), site, Maker())
    later = release(mechanism, ask("task1", 1), site, Maker())
    again = release(mechanism, ask("task0", 1), site, Maker())
    assert first.figures["epsilon"] < later.figures["epsilon"] == again.figures["epsilon"]
    assert len(site.ledger().events()) == 2
