"""Which records of a task a run's clients have, where single records are protected."""

from __future__ import annotations

import pytest

from deal_core.data import Example, load_for_clients
from deal_core.data.source import each_by_itself
from deal_core.errors import UserError
from deal_core.protection import check_records_protected

MANY = [Example(f"text {n}", f"label {n % 3}") for n in range(2000)]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_whether_a_record_is_taken_depends_on_it_alone(share):
    kept = each_by_itself(MANY, "task", share)
    assert abs(len(kept) / len(MANY) - share) < 0.05
    for left_out in range(0, 2000, 397):
        others = MANY[:left_out] + MANY[left_out + 1 :]
        expected = [example for example in kept if example != MANY[left_out]]
        assert list(each_by_itself(others, "task", share)) == expected


def test_under_a_mechanism_for_records_limits_take_about_so_many(make_experiment):
    given = ("data.max_train=0", "data.max_test=20", "data.max_train=100")
    plain = load_for_clients(make_experiment(*given), "surgery")
    private = load_for_clients(make_experiment(*given, "privacy.mechanism=record"), "surgery")
    whole = load_for_clients(make_experiment(*given[:2]), "surgery")
    assert len(plain.train) == pytest.approx(len(private.train), rel=0.3)
    assert len(plain.train) < len(whole.train)
    assert set(private.train) < set(whole.train)
    assert private.test == plain.test


def test_test_records_are_taken_each_by_itself_where_their_counts_leave_with_noise(make_experiment):
    given = ("data.max_train=40", "data.max_test=100", "privacy.mechanism=record")
    whole = load_for_clients(
        make_experiment("data.max_train=40", "data.max_test=0"), "surgery"
    ).test
    clear = load_for_clients(make_experiment(*given), "surgery").test
    noised = load_for_clients(make_experiment(*given, "privacy.metrics=noised"), "surgery").test
    assert len(clear) == 100
    assert noised == each_by_itself(whole, "surgery", 100 / len(whole))
    assert set(noised) < set(whole)


def test_a_limit_of_test_rows_does_not_go_with_noised_counts_of_groups(make_experiment):
    """Which rows it takes would depend on how many a group has."""
    groups = (*("privacy.mechanism=record", 'privacy.unit_column="patient"'), "data.max_train=0")
    noised = "privacy.metrics=noised"
    with pytest.raises(UserError, match=r"data\.max_test takes depends on how many a group has"):
        check_records_protected(make_experiment(*groups, noised, "data.max_test=20"))
    check_records_protected(make_experiment(*groups, noised, "data.max_test=0"))
    check_records_protected(make_experiment(*groups, "data.max_test=20"))
