import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deal_core.errors import UserError
from deal_core.lora.adapter import (
    LoraFactors,
    compress,
    orthogonal_init,
    relative_difference,
    spectrum,
    stack,
    zero_adapter,
)

SHAPES = {"first": (12, 20), "second": (30, 16)}


@pytest.fixture(scope="session")
def drawn(random_adapter):
    return lambda rank, scaling, seed: random_adapter(SHAPES, rank, scaling, seed)


def dense(adapter):
    return {
        name: adapter.scaling * f.B.double() @ f.A.double() for name, f in adapter.layers.items()
    }


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.floats(0.1, 4.0), st.integers(0, 99))
def test_stack_is_the_exact_sum_of_the_updates(drawn, first_rank, second_rank, scaling, seed):
    first = drawn(first_rank, scaling, seed)
    second = drawn(second_rank, 1.0, seed + 100)
    stacked = stack([first, second])
    assert stacked.rank == first_rank + second_rank
    assert stacked.scaling == 1.0
    for name, matrix in dense(stacked).items():
        torch.testing.assert_close(
            matrix, dense(first)[name] + dense(second)[name], rtol=0, atol=1e-5
        )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 99))
def test_compress_equals_the_dense_truncated_svd(drawn, rank, kept, seed):
    adapter = drawn(rank, 1.5, seed)
    result = compress(adapter, kept)
    assert result.rank == kept
    for name, matrix in dense(adapter).items():
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        best = u[:, :kept] * s[:kept] @ vh[:kept]
        torch.testing.assert_close(dense(result)[name], best, rtol=0, atol=1e-4)


def test_compress_is_exact_when_everything_fits_and_pads_with_zeros(drawn):
    adapter = drawn(3, 2.0, 1)
    result = compress(adapter, 8)
    assert relative_difference(result, adapter) < 1e-6
    assert all(not f.A[3:].any() and not f.B[:, 3:].any() for f in result.layers.values())


def test_nothing_learnt_stays_nothing():
    nothing = stack([zero_adapter(SHAPES, 4), zero_adapter(SHAPES, 2, 3.0)])
    result = compress(nothing, 5)
    assert all(not f.A.any() and not f.B.any() for f in result.layers.values())


def test_spectrum_is_deterministic_in_sign(drawn):
    f = drawn(4, 1.0, 3).layers["first"]
    flipped = LoraFactors(-f.A, -f.B)
    torch.testing.assert_close(spectrum(f).U, spectrum(flipped).U)


def test_fresh_adapter_is_orthonormal_scaled_and_outside_what_is_retained(drawn):
    retained = drawn(5, 1.0, 4)
    fresh = orthogonal_init(retained, 6, 2.0, torch.Generator().manual_seed(0))
    for name, f in fresh.layers.items():
        assert not f.B.any()
        torch.testing.assert_close(f.A @ f.A.T, torch.eye(6) / 3.0, rtol=0, atol=1e-6)
        overlap = f.A.double() @ retained.layers[name].A.double().T
        assert overlap.abs().max() < 1e-5
    assert fresh.scaling == 2.0


def test_fresh_adapter_says_when_there_is_no_room(drawn):
    with pytest.raises(UserError, match="no room for 6 new directions: 12 of"):
        orthogonal_init(drawn(12, 1.0, 5), 6, 1.0, torch.Generator())


def test_relative_difference_at_its_extremes(drawn):
    some, nothing = drawn(2, 1.0, 8), zero_adapter(SHAPES, 2)
    assert relative_difference(nothing, nothing) == 0.0
    assert relative_difference(some, nothing) == math.inf
    assert relative_difference(nothing, some) == pytest.approx(1.0)


def test_stack_refuses_other_layers():
    with pytest.raises(ValueError, match="different layers"):
        stack([zero_adapter(SHAPES, 1), zero_adapter({"x": (2, 2)}, 1)])
