from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from deal_core.config.experiment import AdapterConfig
from deal_core.config.method import MethodConfig
from deal_core.errors import UserError
from deal_core.lora.adapter import Adapter, LoraFactors, relative_difference, stack, zero_adapter
from deal_core.lora.state import State
from deal_core.methods import make_method
from deal_core.randomness import seeded
from server.run import Checkpoint, History, load_checkpoint, save_checkpoint
from simulations.run.preflight import check_aggregation

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
