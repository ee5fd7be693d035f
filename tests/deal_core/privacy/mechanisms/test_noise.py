from __future__ import annotations

import pytest
import torch
from scipy.stats import kstest

from deal_core.privacy.noise import SecureNoise, SeededNoise
from deal_core.randomness import seeded

SOURCES = [SecureNoise, lambda: SeededNoise(seeded("noise"))]


@pytest.mark.parametrize("make", SOURCES)
def test_normals_are_normal(make):
    drawn = make().normal(torch.Size([500, 400])).flatten()
    assert drawn.dtype == torch.float64
    assert float(drawn.std()) == pytest.approx(1.0, rel=0.01)
    assert float(drawn.mean()) == pytest.approx(0.0, abs=0.01)
    assert kstest(drawn.numpy(), "norm").pvalue > 1e-6  # wrong shapes give 0, not 1e-5


@pytest.mark.parametrize("make", SOURCES)
def test_uniform_numbers_are_uniform(make):
    drawn = make().uniform(200_000)
    assert float(drawn.min()) > 0.0
    assert float(drawn.max()) <= 1.0
    assert kstest(drawn.numpy(), "uniform").pvalue > 1e-6


def test_draws_are_independent_of_each_other():
    noise = SecureNoise()
    one, two = noise.normal(torch.Size([100_000])), noise.normal(torch.Size([100_000]))
    for other in (two, torch.cat([one[1:], two[:1]])):
        assert abs(float((one * other).mean())) < 0.02


def test_a_secure_stream_cannot_be_repeated_and_is_deaf_to_seeds():
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append(SecureNoise().normal(torch.Size([100])))
    assert not torch.equal(*drawn)
    assert not SecureNoise.simulation_only


def test_a_seeded_one_can_and_says_so():
    one, two = (SeededNoise(seeded("x")).normal(torch.Size([100])) for _ in range(2))
    assert torch.equal(one, two)
    assert SeededNoise.simulation_only
