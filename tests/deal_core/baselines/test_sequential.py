"""Baselines ``olora`` and ``slao`` against their formulas."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from deal_core.baselines.sequential import in_use, overlap
from deal_core.config.experiment import AdapterConfig
from deal_core.config.method import MethodConfig
from deal_core.errors import UserError
from deal_core.lora.adapter import Adapter, LoraFactors, relative_difference, stack, zero_adapter
from deal_core.lora.adapter import zero_adapter as zeros
from deal_core.lora.attach import CURRENT, lora_layers, set_trainable
from deal_core.lora.state import State
from deal_core.methods import make_method
from deal_core.randomness import seeded
from deal_core.training.loop import load_state
from server.run import Checkpoint, History, load_checkpoint, save_checkpoint
from simulations.run.preflight import check_aggregation

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


SHAPES = {"first": (40, 50), "second": (60, 40)}
METHOD = make_method(MethodConfig(name="slao"), AdapterConfig(rank=4, lora_alpha=8.0))


def fine_tuned(state: State, random_adapter, seed: int) -> State:
    """Pretend that clients moved both factors."""
    drawn = random_adapter(SHAPES, 4, 2.0, seed)
    layers = {
        n: LoraFactors(f.A + 0.1 * drawn.layers[n].A, f.B + drawn.layers[n].B)
        for n, f in state.current.layers.items()
    }
    return replace(state, current=Adapter(layers, 2.0))


def test_four_tasks_are_those_of_the_paper_s_equations(random_adapter):
    """Told again with two adapters kept by hand: the merged one, and the fine-tuned one."""
    state = State(zero_adapter(SHAPES, 4, 2.0), zero_adapter(SHAPES, 6))
    merged: dict[str, torch.Tensor] = {}
    last: dict[str, LoraFactors] = {}
    for t in range(1, 5):
        state = METHOD.begin_task(state, seeded(t))
        for name, f in state.current.layers.items():
            if t == 1:
                assert not f.B.any()
                continue
            torch.testing.assert_close(f.B, last[name].B)
            torch.testing.assert_close(f.A @ f.A.T, torch.eye(4), rtol=0, atol=1e-5)
            inside = last[name].A @ f.A.T @ f.A  # the old rows lie in the span of the new ones
            torch.testing.assert_close(inside, last[name].A, rtol=1e-4, atol=1e-5)
        state = fine_tuned(state, random_adapter, t)
        last = dict(state.current.layers)
        state = METHOD.end_task(state)
        for name, f in last.items():
            before = merged.get(name, torch.zeros_like(f.B))
            merged[name] = before + (f.B - before) / math.sqrt(t)
            torch.testing.assert_close(state.current.layers[name].A, f.A, rtol=0, atol=0)
            torch.testing.assert_close(state.current.layers[name].B, merged[name])
        assert relative_difference(stack(state.parts()), state.current) < 1e-6


@pytest.mark.parametrize("ended", [True, False])
def test_what_the_server_keeps_survives_a_checkpoint(random_adapter, tmp_path, ended):
    state = State(zero_adapter(SHAPES, 4, 2.0), zero_adapter(SHAPES, 6))
    state = METHOD.end_task(fine_tuned(METHOD.begin_task(state, seeded(0)), random_adapter, 0))
    if not ended:
        state = fine_tuned(METHOD.begin_task(state, seeded(1)), random_adapter, 1)
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, Checkpoint(position=1, state=state, history=History()))
    read = load_checkpoint(path, SHAPES).state
    following = [
        METHOD.begin_task(each, seeded(1)) if ended else METHOD.end_task(each)
        for each in (state, read)
    ]
    for name, f in following[0].current.layers.items():
        assert torch.equal(f.A, following[1].current.layers[name].A)
        assert torch.equal(f.B, following[1].current.layers[name].B)


@pytest.mark.parametrize("rule", ["flora", "fedex"])
def test_a_rule_that_changes_coordinates_is_refused(make_experiment, rule):
    experiment = make_experiment("method.name=slao", f"aggregation.rule={rule}")
    with pytest.raises(UserError, match="use fedit, ffa"):
        check_aggregation(experiment)
