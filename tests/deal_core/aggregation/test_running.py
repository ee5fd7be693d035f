"""Running sums: linear rules hold a constant number of tensors however many clients there are, and
the aggregation error equals the dense error, as long as it is known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deal_core.aggregation.rule import LORA_A, LORA_B, ClientUpdate
from deal_core.aggregation.rules import make_rule
from deal_core.aggregation.running import (
    MOST_CLIENTS,
    ErrorMeter,
    FactorMean,
    ProductSum,
    one_vector,
)
from deal_core.config.experiment import AggregationConfig
from deal_core.lora.adapter import Adapter, LoraFactors
from tests.deal_core.aggregation.updates import adapter, dense

SHAPES = {"q": (16, 24), "v": (16, 16)}


pytestmark = pytest.mark.usefixtures("one_thread")


def held_bytes(root):
    """Bytes of every tensor that can be reached from ``root``, each storage once."""
    storages, seen, todo = {}, set(), [root]
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            todo.extend(item.values())
        elif isinstance(item, (list, tuple)):
            todo.extend(item)
        elif type(item).__module__.startswith("deal_core"):
            todo.extend(vars(item).values())
        elif callable(item) and getattr(item, "__self__", None) is not None:
            todo.append(item.__self__)
    return sum(storages.values())


def update(before, trained, generator, name):
    layers = {}
    for layer, start in before.layers.items():
        a = torch.randn(start.A.shape, generator=generator) if LORA_A in trained else start.A
        b = torch.randn(start.B.shape, generator=generator) if LORA_B in trained else start.B
        layers[layer] = LoraFactors(a, b)
    return ClientUpdate(name, Adapter(layers, before.scaling), 1.0)


def start(generator):
    layers = {
        name: LoraFactors(
            torch.randn(4, d_in, generator=generator), torch.randn(d_out, 4, generator=generator)
        )
        for name, (d_out, d_in) in SHAPES.items()
    }
    return Adapter(layers, 2.0)


@pytest.mark.parametrize("name", ["fedit", "ffa"])
def test_linear_rules_hold_as_much_after_1000_clients_as_after_200(name):
    generator = torch.Generator().manual_seed(0)
    before = start(generator)
    rule = make_rule(AggregationConfig(rule=name))
    aggregation, held = rule.begin(before), {}
    for k in range(1, 1001):
        aggregation.add(update(before, rule.trained, generator, f"c{k}"))
        held[k] = held_bytes(aggregation)
    one_client = held_bytes(before)
    assert max(held.values()) == max(held[k] for k in range(1, 201))
    # twice one client for the float64 sums; fedit's error meter keeps MOST_CLIENTS
    kept = MOST_CLIENTS * one_client if name == "fedit" else 0
    assert max(held.values()) <= 4 * one_client + kept


def test_sums_of_products_stay_bounded_and_exact():
    generator = torch.Generator().manual_seed(2)
    sums, dense = ProductSum({"q": (12, 30)}), torch.zeros(12, 30, dtype=torch.float64)
    sizes = []
    for k in range(200):
        factors = LoraFactors(
            torch.randn(5, 30, generator=generator), torch.randn(12, 5, generator=generator)
        )
        sums.add({"q": factors}, k - 100.0)
        dense += (k - 100.0) * factors.B.double() @ factors.A.double()
        sizes.append(held_bytes(sums))
    assert max(sizes) <= (2 * 12 + 5) * (12 + 30) * 8
    parts = sums.spectrum("q", 4.0)
    torch.testing.assert_close(parts.U * parts.S @ parts.Vh, dense / 4.0)


def test_what_cancels_leaves_no_direction():
    generator, sums = torch.Generator().manual_seed(3), ProductSum({"q": (12, 30)})
    small = adapter(generator, rank=5, size=1e-3, shapes={"q": (12, 30)}).layers
    for coefficient in (1.0, -1.0):
        sums.add(small, coefficient)
    assert len(sums.spectrum("q", 2.0).S) == 0
    sums.add(small, 1.0)
    assert len(sums.spectrum("q", 3.0).S) == 5


def test_tensors_in_one_piece_of_memory_are_one_vector_without_a_copy():
    whole = torch.arange(20.0)
    parts = [whole[2:8].view(2, 3), whole[8:12].view(4, 1), whole[12:20]]
    assert one_vector(parts).data_ptr() == parts[0].data_ptr()
    assert torch.equal(one_vector(parts), whole[2:])
    for others in (
        [parts[1], parts[0]],  # another order
        [parts[0], parts[2]],  # a gap
        [parts[0].T, parts[1]],  # not in the order of its own values
        [parts[0], parts[1].clone()],  # somewhere else
        [parts[0], whole[8:12:2]],  # every other value
    ):
        copy = one_vector(others)
        assert copy.data_ptr() != others[0].data_ptr()
        assert torch.equal(copy, torch.cat([tensor.flatten() for tensor in others]))


def test_neighbours_in_memory_with_owners_of_their_own_are_copied():
    buffer = np.arange(8, dtype=np.float32)
    parts = [torch.from_numpy(buffer[:4]), torch.from_numpy(buffer[4:])]
    assert parts[0].data_ptr() + 16 == parts[1].data_ptr()
    vector = one_vector(parts)
    assert vector.data_ptr() != parts[0].data_ptr()
    assert vector.tolist() == buffer.tolist()


def test_means_in_one_piece_and_in_many_are_equal():
    generator = torch.Generator().manual_seed(3)
    whole, scattered = FactorMean(), FactorMean()
    for weight in (0.5, 3.0, 7.0):
        values = torch.randn(10, generator=generator)
        parts = [values[:6].view(2, 3), values[6:].view(4, 1)]
        whole.add(parts, weight)
        scattered.add([part.clone() for part in parts], weight)
    assert [mean.shape for mean in whole.mean()] == [(2, 3), (4, 1)]
    assert all(map(torch.equal, whole.mean(), scattered.mean()))


def dense_error(updates, results, shapes):
    total = sum(weight for _, weight in updates)
    gap = size = 0.0
    for name in shapes:
        ideal = sum(weight / total * dense(each, name) for each, weight in updates)
        result = sum(dense(each, name) for each in results)
        gap += float((result - ideal).square().sum())
        size += float(ideal.square().sum())
    return math.sqrt(gap / size)


def read(updates, results, shapes):
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
