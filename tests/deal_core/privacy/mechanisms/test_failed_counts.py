"""Counts that cannot be made: noise alone leaves, and is charged."""

from __future__ import annotations

import pytest

from deal_core.privacy.interface import RehearsalFailed, Site
from deal_core.privacy.ledger import Ledger
from deal_core.protection import make_mechanism
from tests.deal_core.privacy.mechanisms.test_record_mechanism import count, experiment


def test_counts_that_fail_are_noise_and_charged(tmp_path):
    mechanism = make_mechanism(experiment("privacy.metrics=noised"))
    site = Site(lambda: Ledger(tmp_path), None, simulated=False)

    def fails():
        raise RuntimeError("row 7")

    told = count(mechanism, site, 0, fails)
    assert set(told) == {"correct", "correct_all", "examples"}
    assert told == count(mechanism, site, 0, fails)  # once
    assert [event.mechanism for event in site.ledger().events()] == ["counts"]

    def cannot():
        raise RehearsalFailed("no model")

    with pytest.raises(RehearsalFailed):
        count(mechanism, site, 1, cannot)
    assert len(site.ledger().events()) == 1
