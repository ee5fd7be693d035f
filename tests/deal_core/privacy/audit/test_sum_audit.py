"""Noise in the sum, attacked through the sum: true as planned, refuted without a share."""

from __future__ import annotations

import pytest
import torch

from deal_core.models import load_model
from deal_core.models.interface import Encoded
from deal_core.privacy.audit.mechanism_audit import Records
from deal_core.privacy.audit.sum_audit import SumAudit, audit_sum

AUDITED = (
    'data.tasks=["laboratory"]',
    'adapter.target_modules=["4.attention.self.value","5.attention.self.value"]',
    "aggregation.rule=ffa",
    "aggregation.secure=true",
    "federation.clients=4",
    "federation.rounds=2",
    "train.step=server",
    "train.precision=float32",
    "privacy.mechanism=record",
    "privacy.noise_share=sum",
    "privacy.target_delta=1e-5",
)


@pytest.fixture(scope="module")
def records(make_experiment) -> Records:
    config = make_experiment(*AUDITED)
    model = load_model(config.model, config.adapter, 32, torch.float32)
    data = [Encoded((101, 2540 + i, 102), i % 2) for i in range(4)]
    return Records(model, data, ("heart", "skin"))


def audited(make_experiment, records, folder, epsilon, *overrides, **sizes):
    experiment = make_experiment(*AUDITED, f"privacy.target_epsilon={epsilon}", *overrides)
    repetitions = sizes.pop("repetitions", 2)
    return audit_sum(SumAudit(experiment, records, **sizes), folder, repetitions)


@pytest.mark.parametrize("epsilon", [1.0, 2.0, 4.0, 8.0])
def test_the_sum_as_it_is_is_below_the_claim(make_experiment, records, tmp_path, epsilon):
    found = audited(make_experiment, records, tmp_path, epsilon)
    assert 0.9 * epsilon < found.claimed <= epsilon
    assert not found.refuted
    assert found.bound.epsilon <= found.claimed


@pytest.mark.parametrize("overrides", [("privacy.sample_rate=0.5",), ("privacy.noise=secure",)])
def test_so_it_is_with_samples_and_with_noise_that_nobody_can_repeat(
    make_experiment, records, tmp_path, overrides
):
    assert not audited(make_experiment, records, tmp_path, 4.0, *overrides).refuted


THREE = ("federation.clients=3",)
"""Of which one may collude: two shares are the whole noise."""
MANY = {"silent": 1, "canaries": 1500, "repetitions": 8}


@pytest.mark.parametrize("epsilon", [4.0, 8.0])
def test_a_site_that_leaves_its_noise_out_is_noticed(make_experiment, records, tmp_path, epsilon):
    """One more than was planned to fail: one share in the place of two."""
    assert audited(make_experiment, records, tmp_path, epsilon, *THREE, **MANY).refuted


def test_planned_failures_are_counted_on(make_experiment, records, tmp_path):
    """The same one share, in a plan that counts on no more."""
    planned = (*THREE, "privacy.dropouts=1")
    assert not audited(make_experiment, records, tmp_path, 4.0, *planned, **MANY).refuted


def test_a_sum_that_is_not_clipped_is_noticed(make_experiment, records, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "deal_core.privacy.mechanisms.noisy_sum.clipping_bound", lambda bound, *rest: 2 * bound
    )
    assert audited(make_experiment, records, tmp_path, 4.0).refuted
