"""Where groups are protected a canary is a group of records: the audit attacks the unit that is
claimed, and refutes a mechanism that hides single records alone."""

from __future__ import annotations

import pytest

from deal_core.privacy import dpsgd
from deal_core.privacy.dpsgd import PrivateGradients
from deal_core.privacy.ledger import Ledger
from tests.deal_core.privacy.audit.group_records import by_record, three_patients
from tests.deal_core.privacy.audit.harness import Records, audit_mechanism

AUDITED = (
    "method.name=sequential",
    'data.tasks=["laboratory"]',
    "data.max_train=0",
    'adapter.target_modules=["4.attention.self.value","5.attention.self.value"]',
    "train.precision=float32",
    "federation.rounds=2",
    "privacy.mechanism=record",
    "privacy.unit_column=patient",
    "privacy.target_delta=1e-5",
    "privacy.sample_rate=0.5",
)


@pytest.fixture(scope="module")
def records(make_experiment) -> Records:
    return three_patients(make_experiment(*AUDITED))


@pytest.fixture
def audit(make_experiment, records, tmp_path, one_thread):
    def run(epsilon: float, *overrides: str, **sizes: int):
        experiment = make_experiment(*AUDITED, f"privacy.target_epsilon={epsilon}", *overrides)
        sizes = {"canaries": 1500, "repetitions": 2, **sizes}
        return audit_mechanism(experiment, records, tmp_path / "audit", **sizes)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [1.0, pytest.param(8.0, marks=pytest.mark.slow)])
def test_the_mechanism_as_it_is_is_not_refuted(audit, tmp_path, monkeypatch, epsilon):
    sizes = []
    original = PrivateGradients.batches

    def watched(self):
        sizes.append((len(self.data), len(self.groups)))
        return original(self)

    monkeypatch.setattr(PrivateGradients, "batches", watched)
    found = audit(epsilon)
    assert 0.9 * epsilon < found.claimed <= epsilon
    assert not found.refuted
    assert found.bound.epsilon < found.claimed
    assert set(sizes) == {(6 + 3 * 1500, 3 + 1500)}  # a canary is a group of three
    events = Ledger(tmp_path / "audit" / "repetition-0").events()
    assert {(event.unit, event.unit_column) for event in events} == {("group", "patient")}


@pytest.mark.slow
def test_clipping_by_record_is_refuted_where_groups_are_claimed(audit, monkeypatch):
    monkeypatch.setattr(dpsgd, "clipped_group_gradients", by_record)
    found = audit(1.0)
    assert found.claimed <= 1.0
    assert found.p_value < 0.01


def test_the_same_mechanism_is_not_refuted_by_canaries_of_one_record(audit, monkeypatch):
    """So it is the groups that show it."""
    monkeypatch.setattr(dpsgd, "clipped_group_gradients", by_record)
    monkeypatch.setattr("deal_core.privacy.audit.planted.GROUP_RECORDS", 1)
    assert audit(1.0).p_value > 0.05
