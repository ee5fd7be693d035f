"""The aggregation error equals the dense error, as long as it is known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deal_core.aggregation.running import ErrorMeter
from deal_core.lora.adapter import Adapter, LoraFactors
from tests.deal_core.aggregation.updates import adapter, dense

pytestmark = pytest.mark.usefixtures("one_thread")


def dense_error(updates, results, shapes):
    total = sum(weight for _, weight in updates)
    gap = size = 0.0
    for name in shapes:
        ideal = sum(weight / total * dense(each, name) for each, weight in updates)
        result = sum(dense(each, name) for each in results)
        gap += float((result - ideal).square().sum())
        size += float(ideal.square().sum())
    return math.sqrt(gap / size)


def read(updates, results, shapes) -> float | None:
    meter = ErrorMeter(shapes)
    for each, weight in updates:
        meter.add(each, weight)
    return meter.read(*results)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 8), st.integers(1, 20))
def test_it_equals_the_dense_error(seed, clients, rank, side):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q": (side, side + 3), "v": (2 * side, side)}
    weights = (0.1 + torch.rand(clients, generator=generator)).tolist()
    updates = [(adapter(generator, rank, 0.5 + w, shapes=shapes), w) for w in weights]
    results = [adapter(generator, own, 0.7, shapes=shapes) if own else None for own in (2, 0, 5)]
    expected = dense_error(updates, [each for each in results if each], shapes)
    assert read(updates, results, shapes) == pytest.approx(expected, rel=1e-9)


def test_beyond_so_many_clients_or_ranks_it_is_not_known():
    generator, shapes = torch.Generator().manual_seed(3), {"q": (10, 12)}
    each, wide = (adapter(generator, rank, shapes=shapes) for rank in (8, 512))
    for updates in ([(each, 1.0)] * 64, [(wide, 1.0)]):
        assert read(updates, [updates[0][0]], shapes) is not None
        assert read([*updates, (each, 1.0)], [each], shapes) is None


def test_nothing_and_zero():
    shapes = {"q": (4, 5)}
    zero = Adapter({"q": LoraFactors(torch.zeros(2, 5), torch.zeros(4, 2))}, 1.0)
    one = Adapter({"q": LoraFactors(torch.ones(2, 5), torch.ones(4, 2))}, 1.0)
    with pytest.raises(ValueError, match="no client update"):
        ErrorMeter(shapes).read(one)
    assert read([(zero, 1.0)], [zero], shapes) == 0.0
    assert read([(zero, 1.0)], [one], shapes) == math.inf
    assert read([(one, 1.0)], [zero], shapes) == pytest.approx(1.0)
