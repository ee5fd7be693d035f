"""The aggregation error equals the dense error; its sketch keeps the stated tolerance."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deal_core.aggregation.aggregation_error import AggregationError, ErrorMeter
from deal_core.lora.adapter import Adapter, LoraFactors

pytestmark = pytest.mark.usefixtures("one_thread")


def adapter(shapes, rank, scaling, generator):
    layers = {
        name: LoraFactors(
            torch.randn(rank, d_in, generator=generator),
            torch.randn(d_out, rank, generator=generator),
        )
        for name, (d_out, d_in) in shapes.items()
    }
    return Adapter(layers, scaling)


def delta(given, name):
    factors = given.layers[name]
    return given.scaling * factors.B.double() @ factors.A.double()


def dense_error(updates, results, shapes):
    total = sum(weight for _, weight in updates)
    gap = size = 0.0
    for name in shapes:
        ideal = sum(weight / total * delta(each, name) for each, weight in updates)
        result = sum(delta(each, name) for each in results)
        gap += float((result - ideal).square().sum())
        size += float(ideal.square().sum())
    return math.sqrt(gap / size), math.sqrt(size)


def read(updates, results, shapes, **limits) -> AggregationError:
    meter = ErrorMeter(shapes, **limits)
    for each, weight in updates:
        meter.add(each, weight)
    return meter.read(*results)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 8), st.integers(1, 20))
def test_exact_error_equals_the_dense_error(seed, clients, rank, side):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q": (side, side + 3), "v": (2 * side, side)}
    weights = (0.1 + torch.rand(clients, generator=generator)).tolist()
    updates = [(adapter(shapes, rank, 0.5 + w, generator), w) for w in weights]
    results = [adapter(shapes, 2, 0.7, generator), None, adapter(shapes, 5, 1.0, generator)]
    reading = read(updates, results, shapes)
    error, size = dense_error(updates, [each for each in results if each], shapes)
    assert reading.error == pytest.approx(error, rel=1e-9)
    assert reading.ideal_norm == pytest.approx(size, rel=1e-9)
    assert not reading.estimated


def test_sketch_stays_within_its_stated_deviation():
    """12 layers, 90 clients: the norm's relative deviation is far below the bound of 18 %."""
    generator = torch.Generator().manual_seed(0)
    shapes = {f"layer{i}": (48, 64) for i in range(12)}
    updates = [(adapter(shapes, 8, 2.0, generator), 1.0 + k) for k in range(90)]
    for results in ([adapter(shapes, 8, 0.1, generator)], [updates[0][0], updates[1][0]]):
        reading = read(updates, results, shapes)
        error, size = dense_error(updates, results, shapes)
        assert reading.estimated
        assert reading.error == pytest.approx(error, rel=0.125)
        assert reading.ideal_norm == pytest.approx(size, rel=0.125)


def test_sketch_is_unbiased_in_the_square():
    """The mean over 300 test matrices of the hardest case, one direction of one layer."""
    generator = torch.Generator().manual_seed(1)
    squares = []
    for d_in in range(20, 320):  # each width has its own test matrix
        shapes = {"q": (3, d_in)}
        updates = [(adapter(shapes, 1, 1.0, generator), 1.0)] * 2
        zero = Adapter({"q": LoraFactors(torch.zeros(1, d_in), torch.zeros(3, 1))}, 1.0)
        reading = read(updates, [zero], shapes, clients=1)
        assert reading.error == pytest.approx(1.0)
        assert reading.estimated
        size = float(delta(updates[0][0], "q").norm())
        squares.append((reading.ideal_norm / size) ** 2)
    mean, deviation = torch.tensor(squares).mean(), torch.tensor(squares).std()
    assert float(mean) == pytest.approx(1.0, abs=4 * 0.35 / math.sqrt(300))
    assert float(deviation) == pytest.approx(0.35, rel=0.25)


def test_sketch_sees_that_an_exact_result_is_exact():
    generator = torch.Generator().manual_seed(2)
    shapes = {"q": (30, 40)}
    updates = [(adapter(shapes, 4, 2.0, generator), 1.0) for _ in range(3)]
    parts = [Adapter(each.layers, 2.0 / 3.0) for each, _ in updates]
    reading = read(updates, parts, shapes, rows=5)
    assert reading.estimated
    assert reading.error < 1e-6


def test_switch_from_exact_to_estimated():
    generator = torch.Generator().manual_seed(3)
    shapes = {"q": (10, 12)}
    each = adapter(shapes, 8, 1.0, generator)
    assert not read([(each, 1.0)] * 64, [each], shapes).estimated
    assert read([(each, 1.0)] * 65, [each], shapes).estimated
    wide = adapter(shapes, 512, 1.0, generator)
    assert not read([(wide, 1.0)], [wide], shapes).estimated
    assert read([(wide, 1.0), (each, 1.0)], [wide], shapes).estimated


def test_nothing_and_zero():
    shapes = {"q": (4, 5)}
    zero = Adapter({"q": LoraFactors(torch.zeros(2, 5), torch.zeros(4, 2))}, 1.0)
    one = Adapter({"q": LoraFactors(torch.ones(2, 5), torch.ones(4, 2))}, 1.0)
    with pytest.raises(ValueError, match="no client update"):
        ErrorMeter(shapes).read(one)
    assert read([(zero, 1.0)], [zero], shapes).error == 0.0
    assert read([(zero, 1.0)], [one], shapes).error == math.inf
    assert read([(one, 1.0)], [zero], shapes).error == pytest.approx(1.0)
