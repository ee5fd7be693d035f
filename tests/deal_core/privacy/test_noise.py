"""Where noise comes from, and whole-number noise of the density that is charged."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest, norm

from deal_core.privacy.distributed_noise import density_gap, slack_of
from deal_core.privacy.noise import BITS, SecureNoise, SeededNoise, _below, discrete_gaussian
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


@dataclass(frozen=True)
class Always:
    """A source whose every number is the same."""

    number: float

    def uniform(self, count):
        return torch.full((count,), self.number, dtype=torch.float64)


def test_whole_numbers_below_a_width_begin_at_zero_and_end_before_it():
    assert _below(7, 2, Always(1 / BITS)).tolist() == [0, 0]
    assert _below(7, 2, Always(7 / BITS)).tolist() == [6, 6]
    assert _below(7, 2, Always(8 / BITS)).tolist() == [0, 0]
    assert not len(_below(7, 2, Always(1.0)))  # beyond the last whole seven: drawn again


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


def test_a_seeded_one_can():
    one, two = (SeededNoise(seeded("x")).normal(torch.Size([100])) for _ in range(2))
    assert torch.equal(one, two)


def seeded_noise(seed=0):
    return SeededNoise(torch.Generator().manual_seed(seed))


def density(sigma, reach):
    values = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    return values / values.sum()


@pytest.mark.parametrize("noise", [seeded_noise(), SecureNoise()], ids=["seeded", "secure"])
@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.5, 17.0])
def test_draws_have_the_density(noise, sigma):
    drawn, reach = discrete_gaussian(100_000, sigma, noise), 200
    counts = np.bincount(drawn + reach, minlength=2 * reach + 1)
    expected = density(sigma, reach) * len(drawn)
    often = expected > 10
    scaled = expected[often] * counts[often].sum() / expected[often].sum()
    assert chisquare(counts[often], scaled).pvalue > 1e-4
    assert drawn.dtype == np.int64


def test_equal_seeds_draw_equal_noise_of_any_length():
    one, two = (discrete_gaussian(1000, 40_000.0, seeded_noise(5)) for _ in range(2))
    assert np.array_equal(one, two)
    assert len(discrete_gaussian(0, 3.0, seeded_noise())) == 0
    assert one.std() == pytest.approx(40_000.0, rel=0.1)


@pytest.mark.parametrize("sigma", [0.0, -1.0, 2.0**40, math.nan])
def test_no_other_sigma(sigma):
    with pytest.raises(ValueError, match="sigma"):
        discrete_gaussian(3, sigma, seeded_noise())


@pytest.mark.parametrize("shares", [1, 2, 3, 5])
@pytest.mark.parametrize("sigma", [2.5, 4.0, 8.0])
def test_the_gap_bounds_what_is_found_by_counting(shares, sigma):
    """In one dimension the density of the sum is a convolution, and can be had exactly."""
    reach = 400
    one = density(sigma / math.sqrt(shares), reach)
    total = np.array([1.0])
    for _ in range(shares):
        total = np.convolve(total, one)
    middle = len(total) // 2
    places = np.arange(-int(6 * sigma), int(6 * sigma) + 1)
    rounded = norm.cdf((places + 0.5) / sigma) - norm.cdf((places - 0.5) / sigma)
    gap = np.abs(np.log(total[middle + places] / rounded)).max()
    assert gap <= density_gap(sigma, shares, 1) * (1 + 1e-6) + 1e-9


def test_the_gap_is_small_on_the_grid_and_grows_with_dimensions():
    assert density_gap(5 * 2.0**16, 3, 1152) < 1e-6
    assert density_gap(5 * 2.0**16, 3, 2304) > density_gap(5 * 2.0**16, 3, 1152)
    with pytest.raises(ValueError, match="coarse"):
        density_gap(1.0, 4, 10)
    # (M60) by its formula: 1,152 numbers, five bounds of noise, three that share it
    assert slack_of(5.0, 3, 1152) == pytest.approx(3e-9, rel=0.15)
    assert slack_of(5.0, 3, 0) == slack_of(5.0, 3, 1) == 2 * density_gap(5 * 2.0**16, 3, 1) > 0
