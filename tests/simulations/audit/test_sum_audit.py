"""Noise in the sum, attacked through the sum: true as planned, refuted without a share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deal_core.lora.payload import PREFIX
from deal_core.privacy import dpsgd
from deal_core.privacy.distributed_noise import GRID_BITS, NoisySum
from deal_core.privacy.ledger import Ledger
from deal_core.privacy.noise import SeededNoise
from deal_core.randomness import seeded
from simulations.audit.canaries import GradientCanaries
from simulations.audit.planted import Seen, counted_sites
from tests.simulations.audit.harness import MechanismAudit, Records, audit_mechanism, six_records
from tests.simulations.audit.test_mechanism_audit import GROUPS, by_record

AUDITED = (
    'data.tasks=["laboratory"]',
    "data.max_train=0",
    'adapter.target_modules=["4.attention.self.value","5.attention.self.value"]',
    "aggregation.rule=ffa",
    "aggregation.secure=true",
    "federation.clients=4",
    "federation.rounds=1",
    "train.step=server",
    "train.precision=float32",
    "privacy.mechanism=record",
    "privacy.noise_share=sum",
    "privacy.target_delta=1e-5",
)
THREE = "federation.clients=3"
"""Of which one may collude: two shares are the whole noise."""


@pytest.fixture(scope="module")
def records(make_experiment) -> Records:
    return six_records(make_experiment(*AUDITED))


@pytest.fixture
def audit(make_experiment, records, tmp_path, one_thread):
    def run(
        epsilon: float, *overrides: str, canaries: int = 1000, repetitions: int = 4, silent: int = 0
    ) -> MechanismAudit:
        experiment = make_experiment(*AUDITED, f"privacy.target_epsilon={epsilon}", *overrides)
        sizes = {"canaries": canaries, "repetitions": repetitions, "silent": silent}
        found = audit_mechanism(experiment, records, tmp_path, **sizes)
        assert 0.9 * epsilon < found.claimed <= epsilon
        return found

    return run


def test_the_sum_as_it_is_is_not_refuted(audit):
    assert not audit(4.0, canaries=600, repetitions=3).refuted


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [1.0, 2.0, 4.0, 8.0])
def test_the_sum_as_it_is_is_below_the_claim(audit, epsilon):
    """As far as so few canaries can tell: three times the noise is refuted."""
    found = audit(epsilon)
    assert not found.refuted
    assert found.bound.epsilon <= found.claimed
    assert found.bound.scale < 3


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [1.0, 2.0, 4.0, 8.0])
def test_so_it_is_as_far_as_many_canaries_can_tell(audit, epsilon):
    found = audit(epsilon, canaries=3000, repetitions=16)
    assert not found.refuted
    assert found.bound.scale < 1.5


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", [("privacy.sample_rate=0.5", "federation.rounds=2"), ("privacy.noise=secure",)]
)
def test_so_it_is_with_samples_and_with_noise_that_nobody_can_repeat(audit, overrides):
    assert not audit(4.0, *overrides).refuted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("epsilon", "canaries", "repetitions"),
    [(1.0, 3000, 16), (2.0, 2500, 8), (4.0, 1000, 8), (8.0, 1000, 8)],
)
def test_a_site_that_leaves_its_noise_out_is_noticed(audit, epsilon, canaries, repetitions):
    """One more than was planned to fail: one share in the place of two. At least 80 % of audits of
    these sizes notice it; at epsilon 1, of 8 repetitions of 1,000, 14 %."""
    sizes = {"canaries": canaries, "repetitions": repetitions}
    assert audit(epsilon, THREE, silent=1, **sizes).refuted


@pytest.mark.parametrize(
    ("epsilon", "canaries", "repetitions"),
    [
        pytest.param(1.0, 1500, 8, marks=pytest.mark.slow),
        pytest.param(2.0, 1000, 8, marks=pytest.mark.slow),
        (4.0, 1000, 3),
    ],
)
def test_so_are_two_of_three(audit, epsilon, canaries, repetitions):
    """One share in the place of three: noise at 0.58 of what is claimed."""
    assert audit(epsilon, silent=2, canaries=canaries, repetitions=repetitions).refuted


@pytest.mark.slow
def test_planned_failures_are_counted_on(audit):
    """The same one share, in a plan that counts on no more."""
    assert not audit(4.0, THREE, "privacy.dropouts=1", silent=1, repetitions=8).refuted


@pytest.mark.slow
def test_a_sum_that_is_not_clipped_is_noticed(audit, monkeypatch):
    monkeypatch.setattr("deal_core.privacy.dpsgd.clipping_bound", lambda bound, *rest: 2 * bound)
    assert audit(4.0).refuted


@pytest.mark.slow
def test_groups_are_hidden_in_the_sum(audit, tmp_path, monkeypatch):
    sizes = set()
    original = NoisySum.total

    def watched(self, module, objective):
        sizes.add((len(self.data), len(self.groups)))
        return original(self, module, objective)

    monkeypatch.setattr(NoisySum, "total", watched)
    assert not audit(2.0, THREE, GROUPS, repetitions=2).refuted
    assert sizes == {(6 + 3 * 1000, 3 + 1000), (6, 3)}  # a canary is a group of three
    events = Ledger(tmp_path / "repetition-0" / "0").events()
    assert {(event.unit, event.unit_column) for event in events} == {("group", "patient")}


@pytest.mark.slow
def test_clipping_by_record_is_noticed_in_the_sum(audit, monkeypatch):
    """Three records that each pull as far as a group may."""
    monkeypatch.setattr(dpsgd, "clipped_gradients", by_record)
    assert audit(2.0, THREE, GROUPS, repetitions=2).refuted


@pytest.mark.parametrize(
    ("settings", "attacked", "sites"),
    [
        ((), 2, ("2", "0", "1")),
        (("privacy.dropouts=1",), 3, ("3", "0")),
        (("privacy.colluding=3",), 1, ("1",)),
        (("privacy.noise_share=site",), 1, ("1",)),
    ],
)
def test_the_attacker_sees_the_sum_over_those_who_are_counted_on(
    make_experiment, settings, attacked, sites
):
    """Of four: what one colluding site sends is known, and who may fail is not there."""
    assert counted_sites(make_experiment(*AUDITED, *settings), attacked) == sites


def test_a_sum_is_scored_when_it_is_whole():
    """One site's part is its own share of the noise: alone it would show more than is claimed."""
    canaries, key = GradientCanaries(4, 0), f"{PREFIX}layer.lora_B.weight"
    parts = [
        {key: np.arange(8).reshape(4, 2) * 2**GRID_BITS},
        {key: np.full((4, 2), 5 * 2**GRID_BITS)},
    ]
    sum_of = NoisySum(
        (),
        (),
        2,
        sample_rate=1.0,
        noise_multiplier=2.0,
        max_grad_norm=1.0,
        noise=SeededNoise(seeded(0, "noise")),
    )
    seen, place = Seen(canaries, ("1", "0")), ("a task", "learn", 1, 1)
    seen.take("2", place, parts[0], sum_of)
    seen.take("1", place, parts[0], sum_of)
    assert not seen.total.any()
    seen.take("0", place, parts[1], sum_of)
    both = {"layer.lora_B": torch.tensor((parts[0][key] + parts[1][key]) / 2**GRID_BITS)}
    expected = (canaries.scores(both) - 0.5) / 4
    np.testing.assert_allclose(seen.total, expected)
    assert (seen.open, seen.scored) == ({}, 1)
