from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deal_core.config.method import MethodConfig, RetentionConfig
from deal_core.errors import UserError
from deal_core.lora.adapter import (
    Adapter,
    LoraFactors,
    compress,
    relative_difference,
    spectrum,
    stack,
    zero_adapter,
)
from deal_core.methods import make_method
from deal_core.methods.deal.retention import GAINS, bulk_noise, kernel_mean, retain, wiener_gains

SHAPES = {"first": (40, 50), "second": (60, 45)}


def wiener(noise: float = 0.0, **kernels: float) -> RetentionConfig:
    return RetentionConfig.model_validate({"filter": "wiener", "noise": noise, **kernels})


def dense(factors: LoraFactors, scaling: float = 1.0) -> torch.Tensor:
    return scaling * factors.B.double() @ factors.A.double()


def clipped_wiener(S: torch.Tensor, noise: float) -> torch.Tensor:
    return (1 - (noise / S) ** 2).clamp(min=0)


def weakest_and_strongest(adapter: Adapter) -> tuple[float, float]:
    S = torch.cat([spectrum(f, adapter.scaling).S for f in adapter.layers.values()])
    return float(S.min()), float(S.max())


@pytest.mark.parametrize(
    "config",
    [RetentionConfig(), RetentionConfig(noise=5.0), RetentionConfig(kernels=2, width=9.0)],
)
def test_gains_of_one_give_back_the_input(random_adapter, config):
    """To the last bit what plain truncation gives, however wide the kernels are."""
    adapter = random_adapter(SHAPES, 7, 0.5, 0)
    for rank in (3, 7, 12):
        kept, plain = retain(adapter, rank, config), compress(adapter, rank)
        for name, factors in plain.layers.items():
            assert torch.equal(kept.layers[name].A, factors.A)
            assert torch.equal(kept.layers[name].B, factors.B)


def test_no_noise_is_the_identity(random_adapter):
    """Everything fits into the rank, so the estimate is 0 and the Wiener gains are 1."""
    adapter = random_adapter(SHAPES, 7, 0.5, 1)
    for rank in (7, 9):
        assert relative_difference(retain(adapter, rank, wiener()), adapter) < 1e-6
    padded = stack([compress(adapter, 16), zero_adapter(SHAPES, 4)])
    assert relative_difference(retain(padded, 8, wiener()), adapter) < 1e-6


def test_noise_above_everything_removes_everything(random_adapter):
    adapter = random_adapter(SHAPES, 5, 1.0, 2)
    _, strongest = weakest_and_strongest(adapter)
    for noise in (strongest, 1e9):
        result = retain(adapter, 6, wiener(noise))
        assert all(not f.A.any() and not f.B.any() for f in result.layers.values())


@pytest.mark.parametrize("name", GAINS)
def test_nothing_learnt_stays_nothing(name):
    config = RetentionConfig(filter=name)
    for noise in (0.0, 1.0):
        result = retain(zero_adapter(SHAPES, 4), 6, config.model_copy(update={"noise": noise}))
        assert all(not f.A.any() and not f.B.any() for f in result.layers.values())
        assert result.rank == 6


@pytest.mark.parametrize("width", [1e-4, 0.25, 2.0])
@pytest.mark.parametrize("noise", [0.0, 30.0])
def test_factored_equals_dense(random_adapter, noise, width):
    """The obvious slow way: SVD of the dense matrix in float64, the formula word for word."""
    adapter, rank, J = random_adapter(SHAPES, 8, 0.7, 3), 5, 6
    config = wiener(noise, kernels=J, width=width)
    for name, kept in retain(adapter, rank, config).layers.items():
        U, S, Vh = torch.linalg.svd(dense(adapter.layers[name], 0.7), full_matrices=False)
        U, S, Vh = U[:, :8], S[:8], Vh[:8]
        floor = noise or float(S[rank:].sort().values[1])
        x, c = S / S[0], torch.quantile(S / S[0], torch.linspace(0, 1, J).double())
        phi = torch.exp(-((x[:, None] - c) ** 2) / (2 * (width / J) ** 2)).clamp(min=1e-300)
        rho = (phi * clipped_wiener(c * S[0], floor)).sum(1) / phi.sum(1)
        if width == 1e-4:  # every kernel underflows somewhere: the nearest centre has the gain
            nearest = (x[:, None] - c).abs().argmin(dim=1)
            rho = clipped_wiener(c * S[0], floor)[nearest]
        expected = U[:, :rank] * (rho * S)[:rank] @ Vh[:rank]
        torch.testing.assert_close(dense(kept), expected, rtol=0, atol=2e-5 * float(S[0]))


@settings(max_examples=25, deadline=None)
@given(st.floats(0.05, 0.9), st.integers(0, 99))
def test_narrow_kernels_are_the_wiener_shrinkage_of_each_value(random_adapter, part, seed):
    """With a centre at every singular value, and approached with ever more centres."""
    adapter = random_adapter({"only": (40, 50)}, 9, 1.0, seed)
    S = spectrum(adapter.layers["only"]).S
    noise = part * float(S[0])
    expected = clipped_wiener(S, noise) * S
    gaps = []
    for J in (9, 65, 2049):
        kept = spectrum(retain(adapter, 9, wiener(noise, kernels=J, width=1e-2)).layers["only"])
        gaps.append(float((kept.S - expected).abs().max() / S[0]))
    assert gaps[0] < 1e-5
    assert gaps[2] < 1e-2


@settings(max_examples=50, deadline=None)
@given(st.floats(0.0, 1.5), st.floats(1e-3, 3.0), st.integers(2, 20), st.integers(0, 999))
def test_large_directions_survive(noise, tau, kernels, seed):
    """rho never falls with x, and stays within the gains."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(kernels, generator=generator).double()
    centres = draw.sort().values.clamp(min=1e-3)
    gains = wiener_gains(centres, noise)
    rho = kernel_mean(torch.linspace(0, 1, 200).double(), centres, tau, gains)
    assert (rho.diff() >= -1e-12).all()
    assert gains.min() - 1e-12 <= rho.min()
    assert rho.max() <= gains.max() + 1e-12


def test_very_wide_kernels_give_the_mean_gain():
    gains = torch.tensor([0.0, 0.5, 1.0]).double()
    centres = torch.tensor([0.1, 0.5, 1.0]).double()
    rho = kernel_mean(torch.rand(5).double(), centres, 1e6, gains)
    torch.testing.assert_close(rho, torch.full((5,), 0.5).double())


def test_the_noise_floor_is_that_of_planted_noise():
    """Columns of noise in the paper's sense, D^T D = sigma^2 I up to chance; rank 4 is signal."""
    for seed in range(5):
        clean, noisy, sigma = planted(seed)
        S = spectrum(noisy.layers["layer"]).S
        assert bulk_noise(S, 4) == pytest.approx(sigma, rel=0.2)
        assert bulk_noise(spectrum(clean.layers["layer"]).S, 4) == 0.0


def test_the_noise_floor_follows_the_scale(random_adapter):
    adapter = random_adapter({"only": (40, 50)}, 9, 1.0, 4)
    S = spectrum(adapter.layers["only"]).S
    assert bulk_noise(1000 * S, 4) == pytest.approx(1000 * bulk_noise(S, 4))
    assert bulk_noise(S, 9) == 0.0
    assert bulk_noise(torch.zeros(9), 4) == 0.0


def planted(seed: int) -> tuple[Adapter, Adapter, float]:
    """A layer of rank 4, and the same under noise in ``B`` that spreads over 24 directions."""
    generator = torch.Generator().manual_seed(seed)
    d_out, d_in, rank, sigma = 300, 200, 24, 0.3

    def orthonormal(rows: int, columns: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(rows, columns, generator=generator)).Q

    A = orthonormal(d_in, rank).T
    B = torch.zeros(d_out, rank)
    B[:, :4] = orthonormal(d_out, 4) * torch.tensor([2.0, 1.2, 0.8, 0.6])
    noise = torch.randn(d_out, rank, generator=generator) * sigma / d_out**0.5
    clean = Adapter({"layer": LoraFactors(A, B)})
    return clean, Adapter({"layer": LoraFactors(A, B + noise)}), sigma


@pytest.mark.parametrize("known", [True, False])
def test_the_filter_comes_nearer_to_the_clean_matrix_than_truncation(known):
    """Known rank below the retained one, planted noise; on every one of 20 seeds by a third."""
    ratios = []
    for seed in range(20):
        clean, noisy, sigma = planted(seed)
        filtered = retain(noisy, 12, wiener(sigma if known else 0.0))
        error = relative_difference(filtered, clean)
        ratios.append(error / relative_difference(compress(noisy, 12), clean))
    assert max(ratios) < 0.65


def test_the_size_is_constant_however_many_tasks(random_adapter):
    retained = zero_adapter(SHAPES, 6)
    for task in range(8):
        current = random_adapter(SHAPES, 4, 2.0, task)
        retained = retain(stack([retained, current]), 6, wiener())
        assert retained.shapes == SHAPES
        for f in retained.layers.values():
            assert (f.A.shape[0], f.B.shape[1]) == (6, 6)
            assert f.A.isfinite().all()
            assert f.B.isfinite().all()


def test_an_unknown_filter_names_the_known_ones():
    config = MethodConfig.model_validate({"retention": {"filter": "weiner"}})
    known = r"method.retention.filter 'weiner'; known: identity, wiener"
    with pytest.raises(UserError, match=known):
        make_method(config, None)
