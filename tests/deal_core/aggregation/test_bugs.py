"""Mistakes that public implementations make, each with the test that would catch it.

Every case computes the wrong result beside ours on the same federation: ours is exact, the
wrong one is far off, so the test has teeth.
"""

import pytest
import torch

from deal_core.aggregation.rule import ClientUpdate
from deal_core.aggregation.rules import make_rule
from deal_core.config.experiment import AggregationConfig
from deal_core.lora.adapter import Adapter
from tests.deal_core.aggregation.updates import adapter, dense

WEIGHTS = (1.0, 2.0, 3.0, 4.0, 10.0)
SQUARE = {"q": (32, 32)}
SCALING = 2.0


@pytest.fixture
def updates():
    generator = torch.Generator().manual_seed(0)
    own = [adapter(generator, 4, SCALING, shapes=SQUARE) for _ in WEIGHTS]
    return [ClientUpdate(f"c{k}", each, WEIGHTS[k]) for k, each in enumerate(own)]


def aggregate(rule, updates):
    aggregation = make_rule(AggregationConfig(rule=rule)).begin(updates[0].adapter)
    for update in updates:
        aggregation.add(update)
    return aggregation.finish()


def change(result, residual=1.0):
    return dense(result.current, "q") + residual * dense(result.residual, "q")


def error(change, updates):
    ideal = sum(u.weight * dense(u.adapter, "q") for u in updates) / sum(WEIGHTS)
    return float((change - ideal).norm() / ideal.norm())


def test_residual_is_not_transposed_on_square_layers(updates):
    """A transposed residual fits a square layer without a shape error (CERT-Lab/fedex-lora)."""
    result = aggregate("fedex", updates)
    wrong = dense(result.current, "q") + dense(result.residual, "q").T
    assert error(change(result), updates) < 1e-5
    assert error(wrong, updates) > 0.1


@pytest.mark.parametrize("rule", ["fedex", "flora"])
def test_residual_carries_alpha_over_rank(updates, rule):
    """Residual, or merged stack, without ``lora_alpha / r`` (FedLLM-Factory fedexlora, flora)."""
    result = aggregate(rule, updates)
    assert result.residual.scaling == 1.0
    assert error(change(result), updates) < 1e-5
    assert error(change(result, 1 / SCALING), updates) > 0.1


def test_weights_are_the_same_in_product_and_means(updates):
    """Weighted product, unweighted means (FedLLM-Factory fedexlora)."""
    a, b = (
        sum(getattr(u.adapter.layers["q"], part) for u in updates) / len(updates)
        for part in ("A", "B")
    )
    assert error(dense(aggregate("fedex", updates).residual, "q") + SCALING * b @ a, updates) > 0.1
    means = aggregate("fedit", updates)
    gap = error(dense(means.current, "q"), updates)
    assert gap > 0.1
    assert means.error == pytest.approx(gap, rel=1e-4)


def test_scaling_that_differs_between_clients_is_refused_where_it_has_no_meaning(updates):
    other = ClientUpdate("eve", Adapter(updates[0].adapter.layers, 2 * SCALING), 1.0)
    for rule in ("fedit", "ffa", "fedex"):
        aggregation = make_rule(AggregationConfig(rule=rule)).begin(updates[0].adapter)
        with pytest.raises(ValueError, match="scaling"):
            aggregation.add(other)
    assert aggregate("flora", [updates[0], other]).error < 1e-5
