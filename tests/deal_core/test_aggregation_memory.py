"""Linear rules hold a constant number of tensors however many clients there are."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from deal_core.adapters import Adapter, LoraFactors
from deal_core.aggregation import LORA_A, LORA_B, ClientUpdate, make_rule
from deal_core.aggregation.gauge import EXACT_CLIENTS
from deal_core.aggregation.running import ProductSum
from deal_core.config import AggregationConfig

SHAPES = {"q": (16, 24), "v": (16, 16)}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def held_bytes(root) -> int:
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


@pytest.mark.parametrize("name", ["fedit", "ffa", "alternating", "fedsvd"])
def test_linear_rules_hold_as_much_after_1000_clients_as_after_200(name):
    generator = torch.Generator().manual_seed(0)
    before = start(generator)
    rule = make_rule(AggregationConfig(rule=name))
    aggregation, held = rule.begin(before, 1), {}
    for k in range(1, 1001):
        aggregation.add(update(before, rule.trained(1), generator, f"c{k}"))
        held[k] = held_bytes(aggregation)
    one_client = held_bytes(before)
    assert max(held.values()) == max(held[k] for k in range(1, 201))
    # twice one client for the float64 sums; fedit's gauge keeps EXACT_CLIENTS, then a sketch
    kept = EXACT_CLIENTS * one_client if name == "fedit" else 0
    sketch = 32 * 16 * sum(d_out + d_in for d_out, d_in in SHAPES.values())
    assert max(held.values()) <= 4 * one_client + kept + sketch


def test_one_factor_rules_let_go_of_every_update():
    generator = torch.Generator().manual_seed(1)
    before = start(generator)
    aggregation = make_rule(AggregationConfig(rule="ffa")).begin(before, 1)
    one = update(before, {LORA_B}, generator, "c")
    gone = weakref.ref(one.adapter.layers["q"].B)
    aggregation.add(one)
    del one
    gc.collect()
    assert gone() is None


def test_sums_of_products_stay_bounded_and_exact():
    generator = torch.Generator().manual_seed(2)
    sums, dense = ProductSum({"q": (12, 30)}), torch.zeros(12, 30, dtype=torch.float64)
    sizes = []
    for k in range(200):
        factors = LoraFactors(
            torch.randn(5, 30, generator=generator), torch.randn(12, 5, generator=generator)
        )
        sums.add("q", factors, k - 100.0)
        dense += (k - 100.0) * factors.B.double() @ factors.A.double()
        sizes.append(held_bytes(sums))
    assert max(sizes) <= (2 * 12 + 5) * (12 + 30) * 8
    parts = sums.spectrum("q", 4.0)
    torch.testing.assert_close(parts.U * parts.S @ parts.Vh, dense / 4.0)
