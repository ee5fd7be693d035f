"""Noise in the sum, attacked through the sum: true as planned, refuted without a share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deal_core.lora.payload import PREFIX
from deal_core.models import load_model
from deal_core.models.interface import Encoded
from deal_core.privacy.audit.canaries import GradientCanaries
from deal_core.privacy.audit.planted_sum import SeenSums, counted_sites
from deal_core.privacy.distributed_noise import GRID_BITS, NoisySum
from deal_core.privacy.noise import SeededNoise
from deal_core.randomness import seeded
from tests.deal_core.privacy.audit.harness import Records, audit_sum

AUDITED = (
    'data.tasks=["laboratory"]',
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


LARGER = [pytest.param(epsilon, marks=pytest.mark.slow) for epsilon in (2.0, 4.0, 8.0)]


@pytest.fixture(scope="module")
def records(make_experiment) -> Records:
    config = make_experiment(*AUDITED)
    model = load_model(config.model, config.adapter, 32, torch.float32)
    data = [Encoded((101, 2540 + i, 102), i % 2) for i in range(4)]
    return Records(model, data, ("heart", "skin"))


def audited(make_experiment, records, folder, epsilon, *overrides, **sizes):
    experiment = make_experiment(*AUDITED, f"privacy.target_epsilon={epsilon}", *overrides)
    return audit_sum(experiment, records, folder, **sizes)


@pytest.mark.parametrize("epsilon", [1.0, *LARGER])
def test_the_sum_as_it_is_is_below_the_claim(make_experiment, records, tmp_path, epsilon):
    """As far as so few canaries can tell: three times the noise is refuted."""
    found = audited(make_experiment, records, tmp_path, epsilon)
    assert 0.9 * epsilon < found.claimed <= epsilon
    assert not found.refuted
    assert found.bound.epsilon <= found.claimed
    assert found.bound.scale < 3


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [1.0, 2.0, 4.0, 8.0])
def test_so_it_is_as_far_as_many_canaries_can_tell(make_experiment, records, tmp_path, epsilon):
    found = audited(make_experiment, records, tmp_path, epsilon, canaries=3000, repetitions=16)
    assert not found.refuted
    assert found.bound.scale < 1.5


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", [("privacy.sample_rate=0.5", "federation.rounds=2"), ("privacy.noise=secure",)]
)
def test_so_it_is_with_samples_and_with_noise_that_nobody_can_repeat(
    make_experiment, records, tmp_path, overrides
):
    assert not audited(make_experiment, records, tmp_path, 4.0, *overrides).refuted


THREE = ("federation.clients=3",)
"""Of which one may collude: two shares are the whole noise."""


@pytest.mark.parametrize(
    ("epsilon", "canaries", "repetitions"),
    [
        pytest.param(1.0, 3000, 16, marks=pytest.mark.slow),
        pytest.param(2.0, 2500, 8, marks=pytest.mark.slow),
        (4.0, 1000, 8),
        pytest.param(8.0, 1000, 8, marks=pytest.mark.slow),
    ],
)
def test_a_site_that_leaves_its_noise_out_is_noticed(
    make_experiment, records, tmp_path, epsilon, canaries, repetitions
):
    """One more than was planned to fail: one share in the place of two. At least 80 % of audits of
    these sizes notice it; at epsilon 1, of 8 repetitions of 1,000, 14 %."""
    sizes = {"silent": 1, "canaries": canaries, "repetitions": repetitions}
    assert audited(make_experiment, records, tmp_path, epsilon, *THREE, **sizes).refuted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("epsilon", "canaries"), [pytest.param(1.0, 1500, marks=pytest.mark.slow), (2.0, 1000)]
)
def test_so_are_two_of_three_at_small_budgets(
    make_experiment, records, tmp_path, epsilon, canaries
):
    """One share in the place of three: noise at 0.58 of what is claimed."""
    sizes = {"silent": 2, "canaries": canaries, "repetitions": 8}
    assert audited(make_experiment, records, tmp_path, epsilon, **sizes).refuted


@pytest.mark.slow
def test_planned_failures_are_counted_on(make_experiment, records, tmp_path):
    """The same one share, in a plan that counts on no more."""
    planned = (*THREE, "privacy.dropouts=1")
    sizes = {"silent": 1, "canaries": 1000, "repetitions": 8}
    assert not audited(make_experiment, records, tmp_path, 4.0, *planned, **sizes).refuted


@pytest.mark.slow
def test_a_sum_that_is_not_clipped_is_noticed(make_experiment, records, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "deal_core.privacy.distributed_noise.clipping_bound",
        lambda bound, *rest: 2 * bound,
    )
    assert audited(make_experiment, records, tmp_path, 4.0).refuted


@pytest.mark.parametrize(
    ("settings", "attacked", "sites"),
    [
        ((), 0, ("0", "1", "2")),
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


def test_a_sum_is_scored_when_it_is_whole(make_experiment):
    """One site's part is its own share of the noise: alone it would show more than is claimed."""
    canaries, key = GradientCanaries(4, 0), f"{PREFIX}layer.lora_B.weight"
    parts = [
        {key: np.arange(8).reshape(4, 2) * 2**GRID_BITS},
        {key: np.full((4, 2), 5 * 2**GRID_BITS)},
    ]
    sum_of = NoisySum((), (), 1.0, 2.0, 1.0, 2, SeededNoise(seeded(0, "noise")))
    seen, place = SeenSums(canaries, np.zeros(4), ("1", "0")), ("a task", "learn", 1, 1)
    seen.take("2", place, parts[0], sum_of)
    seen.take("1", place, parts[0], sum_of)
    assert not seen.total.any()
    seen.take("0", place, parts[1], sum_of)
    both = {"layer.lora_B": torch.tensor((parts[0][key] + parts[1][key]) / 2**GRID_BITS)}
    expected = (canaries.scores(both) - 0.5) / 4
    np.testing.assert_allclose(seen.total, expected)
    assert (seen.open, seen.scored) == ({}, 1)
