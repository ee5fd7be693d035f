"""Norms of changes, refusal beyond a bound, clipping to it."""

from __future__ import annotations

import pytest
import torch

from deal_core.aggregation import (
    LORA_B,
    ClientUpdate,
    change_norms,
    clip_to,
    refuse_beyond,
    weight_delta,
)
from deal_core.lora.adapter import Adapter, LoraFactors
from deal_core.lora.payload import PayloadError
from tests.deal_core.aggregation.updates import (
    SHAPES,
    adapter,
    replies,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_norms_of_changes_equal_the_dense_ones():
    generator = torch.Generator().manual_seed(8)
    before, after = adapter(generator), adapter(generator, rank=5, scaling=0.5)
    norms = change_norms(after, before)
    for name in SHAPES:
        dense = weight_delta(after.layers[name], 0.5, False) - weight_delta(
            before.layers[name], 2.0, False
        )
        assert norms[name] == pytest.approx(float(dense.norm()), rel=1e-5)


def test_refusal_names_the_layer_and_clipping_meets_the_bound():
    generator = torch.Generator().manual_seed(9)
    before, far = adapter(generator), ClientUpdate("eve", adapter(generator), 1.0)
    refuse_beyond(far, before, 0.0)
    refuse_beyond(far, before, 1e9)
    with pytest.raises(PayloadError, match=r"q: .*norm bound 1"):
        refuse_beyond(far, before, 1.0)
    assert clip_to(far, before, 0.0) is far
    assert torch.equal(clip_to(far, before, 1e9).adapter.layers["q"].A, far.adapter.layers["q"].A)
    for bound in (1e-3, 1.0, 20.0):
        clipped = clip_to(far, before, bound)
        assert list(change_norms(clipped.adapter, before).values()) == pytest.approx(
            [bound] * 2, rel=1e-3
        )
    other = ClientUpdate("eve", adapter(generator, rank=2), 1.0)
    with pytest.raises(ValueError, match="cannot be clipped"):
        clip_to(other, before, 1.0)


def test_clipping_keeps_the_direction_and_the_common_factor():
    generator = torch.Generator().manual_seed(10)
    before = adapter(generator)
    (far,) = replies(before, frozenset({LORA_B}), generator, 1)
    clipped = clip_to(far, before, 0.5).adapter.layers["q"]
    start, end = before.layers["q"], far.adapter.layers["q"]
    assert torch.equal(clipped.A, start.A)
    share = 0.5 / change_norms(far.adapter, before)["q"]
    torch.testing.assert_close(clipped.B, start.B + share * (end.B - start.B))


def test_a_nan_is_beyond_every_bound():
    generator = torch.Generator().manual_seed(11)
    before = adapter(generator)
    layers = {n: LoraFactors(f.A, f.B * torch.nan) for n, f in before.layers.items()}
    with pytest.raises(PayloadError):
        refuse_beyond(ClientUpdate("eve", Adapter(layers, 2.0), 1.0), before, 1.0)
