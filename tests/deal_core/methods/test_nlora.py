from __future__ import annotations

import pytest
import torch

from deal_core.config.experiment import AdapterConfig, TrainConfig
from deal_core.config.method import MethodConfig
from deal_core.data import Example
from deal_core.lora.adapter import Adapter, LoraFactors, relative_difference, stack, zero_adapter
from deal_core.lora.attach import CURRENT, lora_layers, read, set_trainable
from deal_core.lora.state import State
from deal_core.methods import LocalTask, make_method
from deal_core.methods.nlora import absolute_sum
from deal_core.randomness import seeded
from deal_core.training.cache import Cache
from deal_core.training.loop import load_state, train

LABELS = ("Anatomy", "Surgery")
DATA = [
    Example("The phrenic nerve supplies the diaphragm", "Anatomy"),
    Example("Laparoscopic removal of the appendix", "Surgery"),
]
BOTH = frozenset({"lora_A", "lora_B"})


@pytest.fixture(scope="module")
def second_task(shapes, random_adapter) -> State:
    drawn = [random_adapter(shapes, 8, 2.0, 1), random_adapter(shapes, 8, 1.0, 2)]
    small = [
        Adapter({n: LoraFactors(f.A * 0.05, f.B * 0.02) for n, f in a.layers.items()}, a.scaling)
        for a in drawn
    ]
    return State(*small)


@pytest.mark.parametrize("trained", [BOTH, frozenset({"lora_B"})])
def test_the_penalty_and_its_gradient_are_those_of_the_dense_update(minilm, second_task, trained):
    """Whatever is retained: it is of the current adapter alone, its scaling included."""
    load_state(minilm, second_task)
    set_trainable(minilm.module, trained)
    found = absolute_sum(minilm.module)
    expected = sum(
        float((2.0 * f.B @ f.A).abs().sum()) for f in second_task.current.layers.values()
    )
    assert float(found.detach()) == pytest.approx(expected, rel=1e-4)
    found.backward()
    for name, layer in lora_layers(minilm.module).items():
        f = second_task.current.layers[name]
        sign = 2.0 * torch.sign(f.B @ f.A)
        A, B = layer.lora_A[CURRENT].weight.grad, layer.lora_B[CURRENT].weight.grad
        torch.testing.assert_close(B, sign @ f.A.T, rtol=1e-3, atol=1e-2)
        if trained == BOTH:
            torch.testing.assert_close(A, f.B.T @ sign, rtol=1e-3, atol=1e-2)
        else:
            assert A is None


def update_after_training(minilm, state: State, weight: float) -> Adapter:
    method = MethodConfig.model_validate({"name": "nlora", "nlora": {"weight": weight}})
    load_state(minilm, state)
    data = minilm.encode(DATA, LABELS)
    objective = make_method(method, AdapterConfig()).objective(
        minilm, state, LocalTask(LABELS, (("Skin",),)), data, Cache()
    )
    train(minilm, objective, data, BOTH, 40, TrainConfig(), seeded(1))
    return read(minilm.module)


def shape_of(adapter: Adapter) -> tuple[float, float]:
    """How large the update is, and how sparse: its absolute sum over that of a flat update of the
    same length, 1 where all entries are alike."""
    dense = torch.cat([(f.B @ f.A).flatten() for f in adapter.layers.values()])
    length = float(dense.norm())
    return length, float(dense.abs().sum()) / (length * dense.numel() ** 0.5)


@pytest.mark.slow
def test_training_makes_the_update_smaller_and_sparser_by_the_weight(minilm, second_task):
    free, light, heavy = (
        shape_of(update_after_training(minilm, second_task, weight)) for weight in (0, 1e-4, 1e-2)
    )
    assert free[0] > light[0] > heavy[0]
    assert free[1] > heavy[1]


def test_every_task_is_kept_whole_and_drawn_without_regard_to_the_others(random_adapter):
    shapes = {"first": (40, 50), "second": (60, 40)}
    method = make_method(MethodConfig(name="nlora"), AdapterConfig(rank=4, lora_alpha=8.0))
    state, learnt = State(zero_adapter(shapes, 4, 2.0), zero_adapter(shapes, 6)), []
    overlap = 0.0
    for task in range(3):
        state = method.begin_task(state, seeded(task))
        drawn = random_adapter(shapes, 4, 2.0, task)
        for name, f in state.current.layers.items():
            overlap = max(overlap, float((f.A @ state.retained.layers[name].A.T).abs().max()))
        layers = {n: LoraFactors(f.A, drawn.layers[n].B) for n, f in state.current.layers.items()}
        learnt.append(Adapter(layers, 2.0))
        state = method.end_task(State(learnt[-1], state.retained))
        assert state.retained.rank == 4 * (task + 1)
        assert relative_difference(state.retained, stack(learnt)) < 1e-6
    assert overlap > 0.01
