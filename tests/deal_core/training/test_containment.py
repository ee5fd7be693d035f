"""A failure about one protected record is nobody else's; any other is everybody's."""

from __future__ import annotations

import logging

import pytest

from deal_core.training.batching import contained


def fail() -> int:
    raise IndexError("a text of 9 tokens")


def test_a_failure_about_one_record_is_none_and_stands_in_the_sites_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.ERROR):
        assert contained(fail, alone=True) is None
    assert [r.exc_info is not None for r in caplog.records] == [True]


def test_a_failure_about_several_records_is_raised() -> None:
    with pytest.raises(IndexError, match="9 tokens"):
        contained(fail, alone=False)
