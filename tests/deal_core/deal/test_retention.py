"""Retention against dense formulas, and what must hold of any entry."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deal_core.config.experiment import MethodConfig, RetentionConfig
from deal_core.deal import retention as wavelet
from deal_core.deal.retention import RETENTIONS, kernel_mean, noise_floor, retain, shrinkage
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

SHAPES = {"first": (40, 50), "second": (60, 45)}


WAVELET = RetentionConfig(filter="wavelet")


def clipped_wiener(S, noise):
    return (1 - (noise / S) ** 2).clamp(min=0)


def test_svd_is_plain_truncation_to_the_bit(random_adapter):
    adapter = random_adapter(SHAPES, 7, 0.5, 0)
    for rank in (3, 7, 12):
        kept, plain = retain(adapter, rank, RetentionConfig()), compress(adapter, rank)
        for name, factors in plain.layers.items():
            assert torch.equal(kept.layers[name].A, factors.A)
            assert torch.equal(kept.layers[name].B, factors.B)


def test_wavelet_is_the_identity_while_everything_fits(random_adapter):
    """The noise floor is 0 then."""
    adapter = random_adapter(SHAPES, 7, 0.5, 1)
    for rank in (7, 9):
        assert relative_difference(retain(adapter, rank, WAVELET), adapter) < 1e-6
    padded = stack([compress(adapter, 16), zero_adapter(SHAPES, 4)])
    assert relative_difference(retain(padded, 8, WAVELET), adapter) < 1e-6


@pytest.mark.parametrize("name", RETENTIONS)
def test_nothing_learnt_stays_nothing_and_the_size_is_constant(random_adapter, name):
    config = RetentionConfig(filter=name)
    retained = retain(zero_adapter(SHAPES, 4), 6, config)
    assert all(not f.A.any() and not f.B.any() for f in retained.layers.values())
    for task in range(8):
        current = random_adapter(SHAPES, 4, 2.0, task)
        retained = retain(stack([retained, current]), 6, config)
        assert retained.shapes == SHAPES
        assert retained.rank == 6
        assert all(f.A.isfinite().all() and f.B.isfinite().all() for f in retained.layers.values())


@pytest.mark.parametrize("width", [1e-4, 0.25, 2.0])
def test_factored_equals_dense(monkeypatch, random_adapter, width):
    """The obvious slow way: SVD of the dense matrix in float64, the formula word for word."""
    adapter, rank, J = random_adapter(SHAPES, 8, 0.7, 3), 5, 6
    monkeypatch.setattr(wavelet, "KERNELS", J)
    monkeypatch.setattr(wavelet, "WIDTH", width)
    for name, kept in retain(adapter, rank, WAVELET).layers.items():
        given_factors = adapter.layers[name]
        whole = 0.7 * given_factors.B.double() @ given_factors.A.double()
        U, S, Vh = torch.linalg.svd(whole, full_matrices=False)
        U, S, Vh = U[:, :8], S[:8], Vh[:8]
        floor = float(S[rank:].sort().values[1])
        x, c = S / S[0], torch.quantile(S / S[0], torch.linspace(0, 1, J).double())
        phi = torch.exp(-((x[:, None] - c) ** 2) / (2 * (width / J) ** 2)).clamp(min=1e-300)
        rho = (phi * clipped_wiener(c * S[0], floor)).sum(1) / phi.sum(1)
        if width == 1e-4:  # every kernel underflows somewhere: the nearest centre has the gain
            nearest = (x[:, None] - c).abs().argmin(dim=1)
            rho = clipped_wiener(c * S[0], floor)[nearest]
        expected = U[:, :rank] * (rho * S)[:rank] @ Vh[:rank]
        found = kept.B.double() @ kept.A.double()
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(S[0]))


@settings(max_examples=50, deadline=None)
@given(st.floats(0.0, 1.5), st.floats(1e-3, 3.0), st.integers(2, 20), st.integers(0, 999))
def test_large_directions_survive(noise, tau, kernels, seed):
    """rho never falls with x, and stays within the gains."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(kernels, generator=generator).double()
    centres = draw.sort().values.clamp(min=1e-3)
    gains = shrinkage(centres, noise)
    rho = kernel_mean(torch.linspace(0, 1, 200).double(), centres, tau, gains)
    assert (rho.diff() >= -1e-12).all()
    assert gains.min() - 1e-12 <= rho.min()
    assert rho.max() <= gains.max() + 1e-12


def test_the_noise_floor_is_that_of_planted_noise_and_follows_the_scale():
    """Columns of noise in the paper's sense, D^T D = sigma^2 I up to chance; rank 4 is signal."""
    for seed in range(5):
        clean, noisy, sigma = planted(seed)
        S = spectrum(noisy.layers["layer"]).S
        assert noise_floor(S, 4) == pytest.approx(sigma, rel=0.2)
        assert noise_floor(1000 * S, 4) == pytest.approx(1000 * noise_floor(S, 4))
        assert noise_floor(spectrum(clean.layers["layer"]).S, 4) == 0.0
    assert noise_floor(S, len(S)) == 0.0
    assert noise_floor(torch.zeros(9), 4) == 0.0


def planted(seed):
    """A layer of rank 4, and the same under noise in ``B`` that spreads over 24 directions."""
    generator = torch.Generator().manual_seed(seed)
    d_out, d_in, rank, sigma = 300, 200, 24, 0.3

    def orthonormal(rows, columns):
        return torch.linalg.qr(torch.randn(rows, columns, generator=generator)).Q

    A = orthonormal(d_in, rank).T
    B = torch.zeros(d_out, rank)
    B[:, :4] = orthonormal(d_out, 4) * torch.tensor([2.0, 1.2, 0.8, 0.6])
    noise = torch.randn(d_out, rank, generator=generator) * sigma / d_out**0.5
    clean = Adapter({"layer": LoraFactors(A, B)})
    return clean, Adapter({"layer": LoraFactors(A, B + noise)}), sigma


def test_wavelet_comes_nearer_to_the_clean_matrix_than_truncation():
    """Known rank below the retained one, planted noise; on every one of 20 seeds by a third."""
    ratios = []
    for seed in range(20):
        clean, noisy, _ = planted(seed)
        error = relative_difference(retain(noisy, 12, WAVELET), clean)
        ratios.append(error / relative_difference(compress(noisy, 12), clean))
    assert max(ratios) < 0.65


def test_an_unknown_retention_names_the_known_ones():
    config = MethodConfig.model_validate({"retention": {"filter": "wavelt"}})
    known = r"method.retention.filter 'wavelt'; known: none, svd, wavelet"
    with pytest.raises(UserError, match=known):
        make_method(config, None)
