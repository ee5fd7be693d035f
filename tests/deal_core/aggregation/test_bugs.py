"""Mistakes that public implementations make, each with the test that would catch it.

Every case computes the wrong result beside ours on the same federation: ours is exact, the
wrong one is far off, so the test has teeth.
"""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from deal_core.aggregation import ClientUpdate, make_rule
from deal_core.config.experiment import AggregationConfig
from deal_core.lora.adapter import Adapter, LoraFactors
from tests.deal_core.aggregation.dense import weight_delta

WIDTH, RANK, ALPHA = 32, 4, 8.0
SCALING = ALPHA / RANK
WEIGHTS = (1.0, 2.0, 3.0, 4.0, 10.0)


@pytest.fixture
def updates():
    generator = torch.Generator().manual_seed(0)
    replies = []
    for k, weight in enumerate(WEIGHTS):
        factors = LoraFactors(
            torch.randn(RANK, WIDTH, generator=generator),
            torch.randn(WIDTH, RANK, generator=generator),
        )
        replies.append(ClientUpdate(f"c{k}", Adapter({"q": factors}, SCALING), weight))
    return replies


def aggregate(rule, updates):
    aggregation = make_rule(AggregationConfig(rule=rule)).begin(updates[0].adapter, 1)
    for update in updates:
        aggregation.add(update)
    return aggregation.finish()


def ideal(updates):
    total = sum(u.weight for u in updates)
    parts = [(u.weight / total, u.adapter.layers["q"]) for u in updates]
    return sum(p * SCALING * f.B @ f.A for p, f in parts)


def error(change, updates):
    return float((change - ideal(updates)).norm() / ideal(updates).norm())


def delta(adapter, fan_in_fan_out=False):
    return weight_delta(adapter.layers["q"], adapter.scaling, fan_in_fan_out)


@pytest.mark.parametrize("conv1d", [False, True])
def test_residual_is_not_transposed_on_square_layers(updates, conv1d):
    """A transposed residual fits a square layer without a shape error (CERT-Lab/fedex-lora)."""
    result = aggregate("fedex", updates)
    change = delta(result.current, conv1d) + delta(result.residual, conv1d)
    wrong = delta(result.current, conv1d) + delta(result.residual, not conv1d)
    assert error(change.T if conv1d else change, updates) < 1e-5
    assert error(wrong.T if conv1d else wrong, updates) > 0.1


@pytest.mark.parametrize("conv1d", [False, True])
def test_layout_of_the_change_is_pefts_own(conv1d):
    base = nn.Sequential()
    base.add_module("layer", Conv1D(6, 6) if conv1d else nn.Linear(6, 6))
    config = peft.LoraConfig(
        r=2, lora_alpha=5, target_modules=["layer"], fan_in_fan_out=conv1d, init_lora_weights=False
    )
    layer = peft.get_peft_model(base, config).base_model.model.layer
    factors = LoraFactors(layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    ours = weight_delta(factors, layer.scaling["default"], conv1d)
    torch.testing.assert_close(ours, layer.get_delta_weight("default"))
    assert not torch.allclose(ours, weight_delta(factors, layer.scaling["default"], not conv1d))


@pytest.mark.parametrize("conv1d", [False, True])
def test_merged_layer_computes_what_the_adapter_did(conv1d):
    """``base(x) + s B A x`` for a rectangular layer of either layout."""
    generator = torch.Generator().manual_seed(1)
    layer = Conv1D(7, 5) if conv1d else nn.Linear(5, 7)
    factors = LoraFactors(
        torch.randn(2, 5, generator=generator), torch.randn(7, 2, generator=generator)
    )
    x = torch.randn(3, 5, generator=generator)
    with torch.no_grad():
        expected = layer(x) + 1.5 * x @ factors.A.T @ factors.B.T
        layer.weight += weight_delta(factors, 1.5, conv1d)
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("rule", ["fedex", "flora"])
def test_residual_carries_alpha_over_rank(updates, rule):
    """Residual, or merged stack, without ``lora_alpha / r`` (FedLLM-Factory fedexlora, flora)."""
    result = aggregate(rule, updates)
    assert result.residual.scaling == 1.0
    change = delta(result.current) + delta(result.residual)
    wrong = delta(result.current) + delta(result.residual) / SCALING
    assert error(change, updates) < 1e-5
    assert error(wrong, updates) > 0.1


@pytest.mark.parametrize("rule", ["fedex", "flora"])
def test_weights_are_the_same_in_product_and_means(updates, rule):
    """Weighted product, unweighted means (FedLLM-Factory fedexlora)."""
    result = aggregate(rule, updates)
    assert error(delta(result.current) + delta(result.residual), updates) < 1e-5
    share = 1.0 / len(updates)
    a = sum(share * u.adapter.layers["q"].A for u in updates)
    b = sum(share * u.adapter.layers["q"].B for u in updates)
    means = aggregate("fedit", updates)
    wrong = delta(aggregate("fedex", updates).residual) + SCALING * b @ a
    assert error(wrong, updates) > 0.1
    assert error(delta(means.current), updates) > 0.1
    assert means.error == pytest.approx(error(delta(means.current), updates), rel=1e-4)


def test_scaling_that_differs_between_clients_is_refused_where_it_has_no_meaning(updates):
    other = ClientUpdate("eve", Adapter(updates[0].adapter.layers, 2 * SCALING), 1.0)
    for rule in ("fedit", "ffa", "fedex"):
        aggregation = make_rule(AggregationConfig(rule=rule)).begin(updates[0].adapter, 1)
        with pytest.raises(ValueError, match="scaling"):
            aggregation.add(other)
    assert aggregate("flora", [updates[0], other]).error < 1e-5
