from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deal_core.config.experiment import AdapterConfig
from deal_core.config.method import MethodConfig
from deal_core.lora.adapter import relative_difference, stack, zero_adapter
from deal_core.lora.state import State, drop_task_start, snapshot_task_start, start_of
from deal_core.methods import LocalTask, make_method
from deal_core.randomness import seeded
from deal_core.training.batching import Cache
from deal_core.training.loop import load_state
from tests.deal_core.deal.distilling import (
    DATA,
    LABELS,
    SEEN,
    divergences,
    expected_losses,
    learnt_adapter,
)


@pytest.fixture(scope="module")
def one_task_learnt(shapes, random_adapter) -> State:
    """As ``end_task`` leaves it: the adapter has learnt something."""
    return State(learnt_adapter(random_adapter, shapes, 3), zero_adapter(shapes, 16))


def bits(state: State) -> list[torch.Tensor]:
    return [t for part in state.parts() for f in part.layers.values() for t in (f.A, f.B)]


@pytest.mark.parametrize("residual_rank", [0, 3])
def test_the_start_is_held_and_released_to_the_bit(random_adapter, residual_rank):
    shapes = {"first": (40, 50), "second": (60, 40)}
    gained = random_adapter(shapes, residual_rank, 1.0, 2) if residual_rank else None
    state = State(random_adapter(shapes, 4, 2.0, 1), zero_adapter(shapes, 1), gained)
    held = snapshot_task_start(state)
    assert relative_difference(stack(held.parts()), stack(state.parts())) < 1e-6
    assert relative_difference(held.retained, stack(state.parts())) < 1e-6
    back = drop_task_start(held)
    assert all(torch.equal(a, b) for a, b in zip(bits(back), bits(state), strict=True))


def test_what_an_exact_rule_leaves_over_is_kept(random_adapter):
    """A task in which the current adapter moves and the residual gains: nothing is lost, and the
    start of the task stays what it was."""
    shapes = {"first": (40, 50), "second": (60, 40)}
    state = State(
        random_adapter(shapes, 4, 2.0, 1), zero_adapter(shapes, 6), random_adapter(shapes, 3, 1, 2)
    )
    held = snapshot_task_start(state)
    moved = State(
        random_adapter(shapes, 4, 2.0, 3),
        held.retained,
        random_adapter(shapes, 2, 1.0, 4),
        held.num_reference_directions,
    )
    released = drop_task_start(moved)
    assert released.residual.rank == 5
    assert relative_difference(stack(released.parts()), stack(moved.parts())) < 1e-6
    began = start_of(moved)
    assert relative_difference(began.current, state.current) < 1e-12
    assert relative_difference(stack(began.parts()), stack(state.parts())) < 1e-6


def test_the_teacher_is_asked_task_by_task(minilm, one_task_learnt):
    built = make_method(MethodConfig(name="lwf"), AdapterConfig())
    state = built.begin_task(one_task_learnt, seeded(0))
    load_state(minilm, state)
    seen = (("Dental", "Skin"), ("Eye",))
    data = minilm.encode(DATA, LABELS)
    to_come = (("Ear",),)  # none of its business
    task = LocalTask(LABELS, seen, future=lambda: to_come)
    objective = built.objective(minilm, state, task, data, Cache())
    assert objective.spaces == list(seen)


def test_the_objective_is_the_formula_with_the_start_as_teacher_in_any_round(
    minilm, one_task_learnt, random_adapter, shapes
):
    """A client that first takes part in the second round has the same teacher."""
    built = make_method(MethodConfig(name="lwf"), AdapterConfig())
    begun = built.begin_task(one_task_learnt, seeded(0))
    data = minilm.encode(DATA, LABELS)
    load_state(minilm, one_task_learnt)
    with torch.no_grad():
        teacher_logits = minilm.scores(data, SEEN)
    later = replace(begun, current=learnt_adapter(random_adapter, shapes, 4))
    load_state(minilm, later)
    objective = built.objective(minilm, later, LocalTask(LABELS, (SEEN,)), data, Cache())
    with torch.no_grad():
        losses = objective.example_losses(range(3))
        load_state(minilm, State(later.current, one_task_learnt.retained))
        new, old = minilm.scores(data, LABELS), minilm.scores(data, SEEN)
    divergence = divergences(old, teacher_logits)
    expected = expected_losses(data, new, divergence, 1.0)
    assert (divergence > 1e-3).all()
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-4)
