"""Counts that cannot be made: noise alone leaves, and is charged."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deal_core.privacy.accounting.ledger import Ledger
from deal_core.privacy.interface import RehearsalFailed, Site
from deal_core.privacy.mechanisms.registry import make_mechanism
from tests.deal_core.privacy.mechanisms.test_record_mechanism import ask, experiment


def counting(place: int):
    empty = {"task": "", "data": (), "record_ids": (), "evaluated": 1}
    request = ask("task0", place, request=f"evaluate {place}")
    return replace(request, **empty, counted=("correct", "examples"))


def test_counts_that_fail_are_noise_and_charged(tmp_path):
    mechanism = make_mechanism(experiment("privacy.metrics=noised"))
    site = Site(lambda: Ledger(tmp_path), None, simulated=False)

    def fails():
        raise RuntimeError("row 7")

    told = mechanism.count(counting(0), site, fails)
    assert set(told) == {"correct", "examples"}
    assert told == mechanism.count(counting(0), site, fails)  # once
    assert [event.mechanism for event in site.ledger().events()] == ["counts"]

    def cannot():
        raise RehearsalFailed("no model")

    with pytest.raises(RehearsalFailed):
        mechanism.count(counting(1), site, cannot)
    assert len(site.ledger().events()) == 1
