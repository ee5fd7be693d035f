"""Gate, MLP and map against their formulas, written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from deal_core.baselines.deal_reference import SMALLEST, Gate, drawn_mlp, fresh_map, open_gate
from deal_core.randomness import seeded


def phi(s: float, centre: float, width: float) -> float:
    return math.exp(-((s - centre) ** 2) / (2 * width))


def gated(s, gate: Gate) -> list[float]:
    """Eq. 10 with phi at minus s for its inverse, number by number."""
    centres, gains = gate.centres.tolist(), gate.gains.tolist()
    widths = [max(math.exp(w), SMALLEST) for w in gate.log_widths.tolist()]
    passed = []
    for k, value in enumerate(s.tolist()):
        total = 0.0
        for j, (c, w) in enumerate(zip(centres, widths, strict=True)):
            total += phi(value, c, w) * gains[j][k] * phi(-value, c, w) * value
        passed.append(max(total, 0.0))
    return passed


def moved_gate(s: torch.Tensor, kernels: int, generator: torch.Generator) -> Gate:
    start = open_gate(s, kernels)
    parts = (start.centres, start.log_widths, start.gains)
    return Gate(
        *(p + 0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parts)
    )


@pytest.mark.parametrize("kernels", [2, 4, 7])
def test_a_gate_is_the_formula(kernels):
    generator = seeded("gate", kernels)
    s = torch.rand(6, generator=generator, dtype=torch.float64).sort(descending=True).values
    for gate in (open_gate(s, kernels), moved_gate(s, kernels, generator)):
        np.testing.assert_allclose(gate(s).numpy(), gated(s, gate), rtol=1e-10, atol=1e-300)
    assert any(value == 0.0 for value in gated(s, Gate(gate.centres, gate.log_widths, -gate.gains)))


def test_a_gate_opens_over_its_spectrum_and_passes_weak_directions_better():
    s = torch.tensor([4.0, 3.0, 2.0, 1.0])
    gate = open_gate(s, 4)
    torch.testing.assert_close(gate.centres, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    widths = torch.tensor([0.75, 1.5, 2.25, 3.0]).square()
    torch.testing.assert_close(gate.log_widths.exp(), widths)
    assert torch.equal(gate.gains, torch.ones(4, 4))
    shares = gate(s) / s
    assert torch.equal(shares.sort().values, shares)
    assert shares[3] > 5 * shares[0] > 0


@pytest.mark.parametrize("value", [0.6, 0.0])
def test_a_flat_spectrum_does_not_pass(value):
    """As under an orthogonal start, and before anything was learnt."""
    s = torch.full((5,), value)
    gate = open_gate(s, 4)
    assert all(part.isfinite().all() for part in (gate.centres, gate.log_widths))
    assert not gate(s).any()


@pytest.mark.parametrize(("n", "hidden", "count"), [(16, 128, 4_240), (1024, 512, 1_050_112)])
def test_an_mlp_is_torchs_on_the_columns(n, hidden, count):
    """Sizes as published, for a factor of rank 16 and a layer of 1,024 outputs."""
    mlp = drawn_mlp(n, seeded("mlp"))
    parts = (mlp.hidden_weight, mlp.hidden_bias, mlp.out_weight, mlp.out_bias)
    assert sum(part.numel() for part in parts) == count
    dense = nn.Sequential(nn.Linear(n, hidden), nn.ReLU(), nn.Linear(hidden, n))
    for parameter, part in zip(dense.parameters(), parts, strict=True):
        parameter.data = part
    matrix = torch.randn(n, 7, generator=seeded("columns"))
    with torch.no_grad():
        torch.testing.assert_close(mlp(matrix), dense(matrix.T).T)


def test_an_mlp_is_drawn_kaiming_uniform_without_biases():
    mlp = drawn_mlp(384, seeded("mlp"))
    for weight, inputs in ((mlp.hidden_weight, 384), (mlp.out_weight, 384)):
        assert weight.abs().max() == pytest.approx(math.sqrt(6 / inputs), rel=1e-3)
        assert weight.var() == pytest.approx(2 / inputs, rel=0.02)
    assert not mlp.hidden_bias.any()
    assert not mlp.out_bias.any()


@pytest.mark.parametrize("shape", [(4, 50), (60, 4)])
def test_a_map_is_the_mlp_of_the_gated_factor(shape):
    start = 0.3 * torch.randn(shape, generator=seeded("start"))
    made = fresh_map(start, 4, seeded("mlp"))
    U, s, Vh = np.linalg.svd(start.double().numpy(), full_matrices=False)
    kept = U @ np.diag(gated(torch.from_numpy(s), made.gate)) @ Vh
    hidden = np.maximum(made.mlp.hidden_weight.double().numpy() @ kept, 0.0)
    expected = made.mlp.out_weight.double().numpy() @ hidden
    assert np.abs(expected).max() > 0.0
    np.testing.assert_allclose(made.factor().numpy(), expected, atol=1e-4 * np.abs(expected).max())


def test_a_map_is_all_it_has_learned_and_values_put_it_back():
    start = torch.randn(60, 4, generator=seeded("start"))
    made, device = fresh_map(start, 4, seeded("mlp")), torch.device("cpu")
    values = {name: value + 0.1 for name, value in made.named().items()}
    assert len(values) == len(made.retaining()) + len(made.updating()) == 7
    put = made.at(values, device)
    assert all(torch.equal(value, values[name]) for name, value in put.named().items())
    assert not torch.equal(put.factor(), made.factor())
    assert torch.equal(made.at({}, device).factor(), made.factor())
    drawn = fresh_map(start, 4, seeded("mlp"))
    assert torch.equal(drawn.factor(), made.factor())
    assert not torch.equal(fresh_map(start, 4, seeded("other")).factor(), made.factor())
