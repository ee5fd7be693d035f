from __future__ import annotations

import pytest
import torch

from deal_core.baselines.sequential import in_use, overlap
from deal_core.config.experiment import AdapterConfig
from deal_core.config.method import MethodConfig
from deal_core.lora.adapter import Adapter, LoraFactors, relative_difference, stack
from deal_core.lora.adapter import zero_adapter as zeros
from deal_core.lora.attach import CURRENT, lora_layers, set_trainable
from deal_core.lora.state import State
from deal_core.methods import make_method
from deal_core.randomness import seeded
from deal_core.training.loop import load_state

BOTH = frozenset({"lora_A", "lora_B"})


@pytest.fixture(scope="module")
def second_task(shapes, random_adapter) -> State:
    """A current adapter that shares directions with the retained one."""
    drawn = [random_adapter(shapes, 8, 2.0, 1), random_adapter(shapes, 8, 1.0, 2)]
    small = [
        Adapter({n: LoraFactors(f.A * 0.05, f.B * 0.02) for n, f in a.layers.items()}, a.scaling)
        for a in drawn
    ]
    return State(*small)


def rows(state: State) -> dict[str, torch.Tensor]:
    return {n: f.A for n, f in state.retained.layers.items()}


def test_the_penalty_and_its_gradient_are_those_of_the_dense_formula(minilm, second_task):
    load_state(minilm, second_task)
    set_trainable(minilm.module, BOTH)
    found = overlap(minilm.module, rows(second_task), 0.5)
    expected = 0.0
    for name, earlier in second_task.retained.layers.items():
        for old in earlier.A:
            for new in second_task.current.layers[name].A:
                expected += 0.5 * float(old @ new) ** 2
    assert float(found.detach()) == pytest.approx(expected, rel=1e-4)
    found.backward()
    for name, layer in lora_layers(minilm.module).items():
        old = second_task.retained.layers[name].A
        products = old @ second_task.current.layers[name].A.T
        torch.testing.assert_close(
            layer.lora_A[CURRENT].weight.grad, products.T @ old, rtol=1e-4, atol=1e-5
        )
        assert layer.lora_B[CURRENT].weight.grad is None


def test_a_round_that_leaves_a_alone_has_no_penalty(minilm, second_task):
    load_state(minilm, second_task)
    set_trainable(minilm.module, frozenset({"lora_B"}))
    assert overlap(minilm.module, rows(second_task), 1.0) is None


def test_every_task_is_kept_whole_and_the_model_grows_by_its_rank(random_adapter):
    shapes = {"first": (40, 50), "second": (60, 40)}
    config = AdapterConfig(rank=4, retained_rank=6, lora_alpha=8.0)
    method = make_method(MethodConfig(name="olora"), config)
    state, is_nonzero = State(zeros(shapes, 4, 2.0), zeros(shapes, 6)), []
    for task in range(4):
        state = method.begin_task(state, seeded(task))
        drawn = random_adapter(shapes, 4, 2.0, task)
        layers = {n: LoraFactors(f.A, drawn.layers[n].B) for n, f in state.current.layers.items()}
        is_nonzero.append(Adapter(layers, 2.0))
        state = method.end_task(State(is_nonzero[-1], state.retained, state.residual))
        assert state.retained.rank == 4 * (task + 1)
        assert relative_difference(state.retained, stack(is_nonzero)) < 1e-6
    for name, f in state.retained.layers.items():
        assert torch.equal(f.A, torch.cat([one.layers[name].A for one in is_nonzero]))


def test_directions_that_change_nothing_are_left_out(random_adapter):
    shapes = {"first": (40, 50), "second": (60, 40)}
    assert in_use(zeros(shapes, 6)).rank == 1
    learnt = random_adapter(shapes, 3, 1.0, 1)
    assert in_use(stack([zeros(shapes, 6), learnt])).rank == 3
