"""Norms of changes, refusal beyond a bound, clipping to it."""

from __future__ import annotations

import pytest
import torch

from deal_core.aggregation import (
    ClientUpdate,
    change_norms,
    refuse_beyond,
    shortened,
)
from deal_core.lora.adapter import Adapter, LoraFactors
from deal_core.lora.payload import PayloadError
from tests.deal_core.aggregation.dense import weight_delta
from tests.deal_core.aggregation.updates import (
    SHAPES,
    adapter,
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


def test_refusal_names_the_layer():
    generator = torch.Generator().manual_seed(9)
    before, far = adapter(generator), ClientUpdate("eve", adapter(generator), 1.0)
    refuse_beyond(far, before, 0.0)
    refuse_beyond(far, before, 1e9)
    with pytest.raises(PayloadError, match=r"q: .*norm bound 1"):
        refuse_beyond(far, before, 1.0)


def test_a_nan_is_beyond_every_bound():
    generator = torch.Generator().manual_seed(11)
    before = adapter(generator)
    layers = {n: LoraFactors(f.A, f.B * torch.nan) for n, f in before.layers.items()}
    with pytest.raises(PayloadError):
        refuse_beyond(ClientUpdate("eve", Adapter(layers, 2.0), 1.0), before, 1.0)


def test_a_change_is_cut_to_the_bound_layer_by_layer_and_a_short_one_stays():
    generator = torch.Generator().manual_seed(12)
    before, after = adapter(generator), adapter(generator)
    norms = change_norms(after, before)
    names = sorted(norms, key=lambda name: norms[name])
    bound = (norms[names[0]] + norms[names[-1]]) / 2
    cut = shortened(after, before, bound)
    for name, norm in change_norms(cut, before).items():
        if norms[name] <= bound:
            assert torch.equal(cut.layers[name].A, after.layers[name].A)
            assert torch.equal(cut.layers[name].B, after.layers[name].B)
        else:
            assert norm == pytest.approx(bound, rel=1e-4)
    assert max(norms.values()) > bound > min(norms.values())
    refuse_beyond(ClientUpdate("eve", shortened(after, before, 0.5), 1.0), before, 0.501)
