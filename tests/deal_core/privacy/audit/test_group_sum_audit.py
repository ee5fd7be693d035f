"""Noise in the sum where groups are protected: a canary is a group of records, and the sum shows
what it would show if records were clipped one by one."""

from __future__ import annotations

import pytest

from deal_core.privacy import dpsgd
from deal_core.privacy.distributed_noise import NoisySum
from deal_core.privacy.ledger import Ledger
from tests.deal_core.privacy.audit.group_records import by_record, three_patients
from tests.deal_core.privacy.audit.harness import Records, audit_sum

AUDITED = (
    'data.tasks=["laboratory"]',
    "data.max_train=0",
    'adapter.target_modules=["4.attention.self.value","5.attention.self.value"]',
    "aggregation.rule=ffa",
    "aggregation.secure=true",
    "federation.clients=3",
    "federation.rounds=1",
    "train.step=server",
    "train.precision=float32",
    "privacy.mechanism=record",
    "privacy.noise_share=sum",
    "privacy.unit_column=patient",
    "privacy.target_epsilon=2.0",
    "privacy.target_delta=1e-5",
)
CANARIES = 1000


@pytest.fixture(scope="module")
def records(make_experiment) -> Records:
    return three_patients(make_experiment(*AUDITED))


@pytest.fixture
def audit(make_experiment, records, tmp_path):
    def run():
        experiment = make_experiment(*AUDITED)
        return audit_sum(experiment, records, tmp_path, canaries=CANARIES, repetitions=2)

    return run


def test_the_sum_as_it_is_is_below_the_claim_of_groups(audit, tmp_path, monkeypatch):
    sizes = set()
    original = NoisySum.total

    def watched(self, module, objective):
        sizes.add((len(self.data), len(self.groups)))
        return original(self, module, objective)

    monkeypatch.setattr(NoisySum, "total", watched)
    found = audit()
    assert 1.8 < found.claimed <= 2.0
    assert not found.refuted
    assert sizes == {(6 + 3 * CANARIES, 3 + CANARIES), (6, 3)}  # a canary is a group of three
    events = Ledger(tmp_path / "repetition-0" / "0").events()
    assert {(event.unit, event.unit_column) for event in events} == {("group", "patient")}


@pytest.mark.slow
def test_clipping_by_record_is_noticed_in_the_sum(audit, monkeypatch):
    """Three records that each pull as far as a group may."""
    monkeypatch.setattr(dpsgd, "clipped_group_gradients", by_record)
    assert audit().refuted
