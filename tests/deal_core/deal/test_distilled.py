"""What DEAL distils from the model as it was at the start of a task: earlier labels, and those to
come."""

from __future__ import annotations

import pytest
import torch

from deal_core.config.experiment import AdapterConfig
from deal_core.config.method import MethodConfig
from deal_core.lora.adapter import zero_adapter
from deal_core.lora.state import State
from deal_core.methods import LocalTask, make_method
from deal_core.randomness import seeded
from deal_core.training.batching import Cache
from deal_core.training.loop import load_state
from tests.deal_core.deal.distilling import (
    DATA,
    LABELS,
    SEEN,
    expected_losses,
    first_task,
    learnt_adapter,
)


@pytest.fixture(scope="module")
def after_one_task(shapes, random_adapter) -> State:
    nothing = zero_adapter(shapes, 8, 2.0)
    return State(nothing, learnt_adapter(random_adapter, shapes, 3))


AHEAD = (("Eye", "Ear"), LABELS[::-1], SEEN, ("Ear", "Eye"), ("Bone", "Eye"))


@pytest.mark.parametrize(
    ("tables", "seen", "choices"),
    [
        ({"future_weight": 0.5}, (SEEN,), {SEEN: 1.0, ("Eye", "Ear"): 0.25, ("Bone", "Eye"): 0.25}),
        (
            {"future_weight": 0.5, "weight": 0.0},
            (SEEN,),
            {("Eye", "Ear"): 0.25, ("Bone", "Eye"): 0.25},
        ),
        ({"future_weight": 0.0}, (SEEN,), {SEEN: 1.0}),
        ({"future_weight": 3.0}, (), {("Eye", "Ear"): 1.0, SEEN: 1.0, ("Bone", "Eye"): 1.0}),
    ],
)
def test_what_tasks_to_come_choose_between_weighs_as_told_but_for_what_is_known(
    minilm, after_one_task, tables, seen, choices
):
    """Labels of a task to come that are being learnt, or have been, are none of its own."""
    built = make_method(MethodConfig.model_validate({"distillation": tables}), AdapterConfig())
    state = built.begin_task(after_one_task, seeded(0))
    load_state(minilm, state)
    data = minilm.encode(DATA, LABELS)
    task = LocalTask(LABELS, seen, future=lambda: AHEAD)
    objective = built.objective(minilm, state, task, data, Cache())
    assert dict(zip(objective.spaces, objective.weights, strict=True)) == choices


def test_in_the_first_task_the_base_model_speaks_for_tasks_to_come(minilm, shapes, random_adapter):
    tables = {"distillation": {"future_weight": 0.7}}
    built = make_method(MethodConfig.model_validate(tables), AdapterConfig())
    data = minilm.encode(DATA, LABELS)
    losses, scores, divergence = first_task(minilm, built, shapes, random_adapter, data)
    expected = expected_losses(data, scores, divergence, 0.7)
    assert (4.0 * divergence > 1e-3).all()
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-4)
