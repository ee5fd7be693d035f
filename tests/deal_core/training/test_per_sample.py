from __future__ import annotations

import pytest
import torch

from deal_core.config.experiment import AdapterConfig, ModelConfig
from deal_core.deal.objective import Plain
from deal_core.lora.attach import read, set_trainable, write
from deal_core.models import load_model
from deal_core.models.interface import Encoded
from tests.deal_core.training.clipped import clipped_gradients

LABELS = ["heart", "skin", "lung"]
TOKENS = ((101, 2540, 102), (101, 3096, 2003, 2009, 102), (101, 2146, 2966, 3160, 2005, 102))
FACTORS = [{"lora_A"}, {"lora_B"}, {"lora_A", "lora_B"}]


@pytest.fixture(scope="module")
def model(random_adapter):
    model = load_model(ModelConfig(), AdapterConfig(), 32)
    write(model.module, random_adapter(read(model.module).shapes, 8, 0.01, seed=5))
    return model


@pytest.fixture
def data():
    """Labels that the model would not give: a gradient near zero is a difference of what rounds."""
    return [Encoded(tokens, (i + 1) % 3) for i, tokens in enumerate(TOKENS)]


def gradient(parameters) -> torch.Tensor:
    """All gradients in one row; forgets them."""
    row = torch.cat([p.grad.flatten() for p in parameters])
    for p in parameters:
        p.grad = None
    return row


def one_by_one(objective, parameters, count) -> list[torch.Tensor]:
    rows = []
    for p in parameters:
        p.grad = None  # what a failed test before has left
    for i in range(count):
        objective.example_losses([i]).sum().backward()
        rows.append(gradient(parameters))
    return rows


@pytest.mark.parametrize("trained", FACTORS)
def test_the_sum_is_that_of_a_loop_over_examples(model, data, trained):
    parameters = set_trainable(model.module, frozenset(trained))
    objective = Plain(model, LABELS, data)
    rows = one_by_one(objective, parameters, 3)
    bound = float(torch.stack(rows).norm(dim=1).median())  # clips some, not all
    norms = clipped_gradients(model.module, objective, [0, 1, 2], bound)
    expected = sum(row * min(1.0, bound / float(row.norm())) for row in rows)
    torch.testing.assert_close(norms, torch.stack([r.norm() for r in rows]), rtol=1e-5, atol=0)
    assert float((gradient(parameters) - expected).norm() / expected.norm()) < 1e-5


def test_one_example_moves_the_sum_by_at_most_the_bound(model, data):
    """Neighbouring batches, the empty one included; adversarial losses."""
    parameters = set_trainable(model.module, frozenset({"lora_A", "lora_B"}))
    objective = Plain(model, LABELS, data)

    class Loud:
        def example_losses(self, batch):
            scale = torch.tensor([1e8 if i == 2 else 1.0 for i in batch])
            return objective.example_losses(batch) * scale

    clipped_gradients(model.module, Loud(), [0, 1], 0.5)
    without = gradient(parameters)
    clipped_gradients(model.module, Loud(), [0, 1, 2], 0.5)
    assert float((gradient(parameters) - without).norm()) == pytest.approx(0.5, rel=1e-3)
    clipped_gradients(model.module, Loud(), [2], 0.5)
    assert float(gradient(parameters).norm()) == pytest.approx(0.5, rel=1e-3)
    assert clipped_gradients(model.module, Loud(), [], 0.5).numel() == 0
    assert all(p.grad is None for p in parameters)


def test_what_is_not_finite_counts_as_zero(model, data):
    parameters = set_trainable(model.module, frozenset({"lora_A", "lora_B"}))
    objective = Plain(model, LABELS, data)

    class Broken:
        def example_losses(self, batch):
            factor = torch.tensor([float("inf") if i == 1 else 1.0 for i in batch])
            return objective.example_losses(batch) * factor

    clipped_gradients(model.module, objective, [0, 2], 1.0)
    expected = gradient(parameters)
    clipped_gradients(model.module, Broken(), [0, 1, 2], 1.0)
    torch.testing.assert_close(gradient(parameters), expected, rtol=1e-3, atol=1e-5)
