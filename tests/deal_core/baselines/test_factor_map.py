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
