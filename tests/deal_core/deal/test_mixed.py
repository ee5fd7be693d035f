from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from deal_core.config.experiment import AdapterConfig, MethodConfig
from deal_core.data import Example
from deal_core.deal.interface import LocalTask, TaskDataset
from deal_core.lora.adapter import zero_adapter
from deal_core.lora.state import State
from deal_core.methods import METHODS, make_method
from deal_core.randomness import seeded
from deal_core.training.loop import load_state

OF_SUMS = ("linear-probe", "prototype")
"""Methods that train nothing."""

SPACES = [("Heart", "Lung", "Eye"), ("Dental", "Skin")]
EXAMPLES = [
    [Example("A murmur in systole", "Heart"), Example("Blurred vision", "Eye")],
    [Example("Caries of the lower molar", "Dental"), Example("It itches", "Skin")],
]


@pytest.fixture(scope="module")
def shares(minilm) -> list[TaskDataset]:
    pairs = zip(SPACES, EXAMPLES, strict=True)
    return [TaskDataset(labels, minilm.encode(examples, labels)) for labels, examples in pairs]


@pytest.mark.parametrize("name", [name for name in METHODS if name not in OF_SUMS])
def test_tasks_learnt_at_once_are_a_first_task_in_every_method(minilm, shapes, shares, name):
    """Cross-entropy of every example in its own label space, whatever the batch."""
    method = make_method(MethodConfig(name=name), AdapterConfig())
    empty = State(zero_adapter(shapes, 8, 2.0), zero_adapter(shapes, 16))
    state = method.begin_task(empty, seeded(0))
    load_state(minilm, state)
    data = [example for share in shares for example in share.data]
    task = LocalTask(minilm, state, data, shares[0].labels, (), joint_tasks=shares)
    objective = method.objective(task)
    order = [3, 0, 2, 1]
    with torch.no_grad():
        found = objective.example_losses(order)
        for loss, i in zip(found, order, strict=True):
            scores = minilm.scores([data[i]], shares[i // 2].labels)
            expected = cross_entropy(scores, torch.tensor([data[i].target]))
            torch.testing.assert_close(loss, expected[()], rtol=1e-4, atol=1e-4)
        assert objective.example_losses([2]).item() == pytest.approx(found[2].item(), rel=1e-4)
