from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import softmax

from deal_core.config.experiment import AdapterConfig, ModelConfig, TrainConfig
from deal_core.config.method import MethodConfig
from deal_core.lora.adapter import Adapter, relative_difference, stack, zero_adapter
from deal_core.lora.attach import lora_layers, read
from deal_core.lora.state import State, drop_task_start, snapshot_task_start, start_of
from deal_core.methods import LocalTask, make_method
from deal_core.models import load_model
from deal_core.randomness import seeded
from deal_core.training.batching import Cache
from deal_core.training.loop import load_state, train
from tests.deal_core.deal.distilling import (
    DATA,
    LABELS,
    SEEN,
    divergences,
    expected_losses,
    learnt_adapter,
)

BOTH = frozenset({"lora_A", "lora_B"})


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


@pytest.mark.parametrize(
    ("softmax", "asked"),
    [("per-task", (("Dental", "Skin"), ("Eye",))), ("joint", (("Dental", "Skin", "Eye"),))],
)
def test_the_teacher_is_asked_task_by_task_or_about_all_at_once(
    minilm, one_task_learnt, softmax, asked
):
    tables = {"name": "lwf", "distillation": {"softmax": softmax}}
    built = make_method(MethodConfig.model_validate(tables), AdapterConfig())
    state = built.begin_task(one_task_learnt, seeded(0))
    load_state(minilm, state)
    seen = (("Dental", "Skin"), ("Eye",))
    data = minilm.encode(DATA, LABELS)
    to_come = (("Ear",),)  # none of its business
    task = LocalTask(LABELS, seen, future=lambda: to_come)
    objective = built.objective(minilm, state, task, data, Cache())
    assert objective.spaces == list(asked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_while_the_start_is_held_the_adapter_learns_on_the_base_model(one_task_learnt, dtype):
    model = load_model(ModelConfig(), AdapterConfig(), 32, dtype)
    load_state(model, snapshot_task_start(one_task_learnt))
    for layer in lora_layers(model.module).values():
        base, now = layer.weights.base.float(), layer.weights.now.float()
        assert not torch.equal(layer.weights.start, layer.weights.base)
        torch.testing.assert_close(now, base, rtol=0, atol=1e-7)


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


def after_training(minilm, method: MethodConfig, learnt: State) -> tuple[Adapter, float]:
    """The adapter, and how far the answers for earlier labels are from those of the start."""
    built = make_method(method, AdapterConfig())
    state = built.begin_task(learnt, seeded(0))
    load_state(minilm, state)
    data = minilm.encode(DATA, LABELS)
    with torch.no_grad():
        start = minilm.scores(data, SEEN)
    objective = built.objective(minilm, state, LocalTask(LABELS, (SEEN,)), data, Cache())
    train(minilm, objective, data, BOTH, 4, TrainConfig(), seeded(1))
    with torch.no_grad():
        now = minilm.scores(data, SEEN)
    gap = softmax(start, 1) * (softmax(start, 1).log() - softmax(now, 1).log())
    return read(minilm.module), float(gap.sum(1).mean())


def weighing(weight: float) -> MethodConfig:
    tables = {"name": "lwf", "distillation": {"weight": weight}}
    return MethodConfig.model_validate(tables)


def test_without_distillation_it_is_sequential_and_with_it_less_is_forgotten(
    minilm, one_task_learnt
):
    sequential, free = after_training(minilm, MethodConfig(name="sequential"), one_task_learnt)
    unweighted, _ = after_training(minilm, weighing(0.0), one_task_learnt)
    weighted, little = after_training(minilm, weighing(1.0), one_task_learnt)
    assert relative_difference(unweighted, sequential) < 1e-3
    assert relative_difference(weighted, sequential) > 1e-2
    assert 0.5 * free > little > 0.0


def test_it_trains_the_adapter_that_sequential_trains(one_task_learnt):
    begun = make_method(MethodConfig(name="lwf"), AdapterConfig()).begin_task(
        one_task_learnt, seeded(0)
    )
    assert begun.current is one_task_learnt.current
