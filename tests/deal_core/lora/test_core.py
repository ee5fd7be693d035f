"""The core adapter: what it is as LoRA, what its gradients are, and how it moves."""

from __future__ import annotations

import pytest
import torch

from deal_core.config.experiment import AdapterConfig, ModelConfig
from deal_core.data import Example
from deal_core.lora.adapter import Adapter, LoraFactors, stack, zero_adapter
from deal_core.lora.attach import lora_layers, read, set_trainable, write
from deal_core.lora.core import begin_core, core_shape, frame_of, from_core
from deal_core.lora.learnt import changed, entries_of, learnt_shapes, learnt_sizes
from deal_core.lora.payload import PREFIX
from deal_core.lora.state import State
from deal_core.methods.shared.plain import Plain
from deal_core.models import load_model
from deal_core.privacy.interface import RecordId
from deal_core.privacy.mechanisms.noise import SeededNoise
from deal_core.privacy.mechanisms.noisy_sum import NoisySum, grid_step
from deal_core.randomness import seeded
from deal_core.training.per_sample import gradient_alone
from deal_core.training.public_gradients import public_gradients
from tests.deal_core.training.clipped import clipped_gradients

LAYER = "encoder.layer.5.output.dense"
LABELS = ("Pathology", "Surgery", "Pharmacology")
TRAINED = frozenset({"lora_B"})


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    adapter = AdapterConfig(kind="core", rank=8, lora_alpha=8, target_modules=("5.output.dense",))
    return load_model(ModelConfig(), adapter, 32)


@pytest.fixture(scope="module")
def begun(model) -> Adapter:
    nothing = zero_adapter(read(model.module).shapes, 8)
    gradients = public_gradients(model, State(nothing, nothing), LABELS)
    return begin_core(nothing, gradients, nothing)


def test_a_task_begins_with_the_model_as_it_was(begun):
    factors = begun.layers[LAYER]
    assert not (factors.B @ factors.A).any()
    A, frame = factors.A[:4], frame_of(factors)
    assert torch.allclose(A @ A.T, torch.eye(4), atol=1e-5)
    assert torch.allclose(frame.T @ frame, torch.eye(4), atol=1e-5)


def test_what_is_retained_is_left_out():
    shapes = {"layer": (12, 10)}
    retained = Adapter({"layer": LoraFactors(draw(3, 10), draw(12, 3, seed=1))})
    begun = begin_core(zero_adapter(shapes, 8), {"layer": draw(12, 10, seed=2)}, retained)
    A = begun.layers["layer"].A
    assert (A @ retained.layers["layer"].A.T).abs().max() < 1e-5
    assert A[:4].norm() > 1.9


def test_fewer_directions_than_the_core_leave_zeros():
    gradient = draw(12, 1) @ draw(1, 10, seed=1)
    nothing = zero_adapter({"layer": (12, 10)}, 8)
    factors = begin_core(nothing, {"layer": gradient}, nothing).layers["layer"]
    assert int((factors.A.norm(dim=1) > 0.5).sum()) == 1
    assert int((frame_of(factors).norm(dim=0) > 0.5).sum()) == 1


def test_public_gradients_are_those_of_the_whole_weight(model):
    """Against a weight that learns by itself, in torch's own backward pass."""
    nothing = zero_adapter(read(model.module).shapes, 8)
    found = public_gradients(model, State(nothing, nothing), LABELS)[LAYER]
    layer = lora_layers(model.module)[LAYER]
    weight = layer.base_layer.weight
    forward = layer.forward
    layer.forward = layer.base_layer.forward
    weight.requires_grad_(True)
    try:
        data = model.encode([Example(label, label) for label in LABELS], LABELS)
        for item in data:
            model.forward_train([item], LABELS, ()).example_losses.sum().backward()
        assert torch.allclose(found, weight.grad, atol=1e-5 * float(weight.grad.abs().max()))
    finally:
        layer.forward = forward
        weight.requires_grad_(False)
        weight.grad = None


def test_gradients_of_the_core_are_those_of_the_core(model, begun):
    """``R -> loss(F R A)`` differentiated by differences."""
    core = 0.1 * draw(4, 4, seed=4).double()
    key = f"{PREFIX}{LAYER}.lora_B.weight"
    data = model.encode([Example("dose of a drug", "Surgery")], LABELS)

    def loss(point: torch.Tensor) -> float:
        write(model.module, changed(begun, {key: point}, core=True))
        with torch.no_grad():
            return float(model.forward_train(data, LABELS, ()).example_losses.sum())

    write(model.module, changed(begun, {key: core}, core=True))
    set_trainable(model.module, TRAINED)
    gradient = gradient_alone(model.module, Plain(model, LABELS, data), 0, core=True)[key]
    assert gradient.shape == (4, 4)
    for place in ((0, 0), (1, 3), (3, 2)):
        step = torch.zeros(4, 4, dtype=torch.float64)
        step[place] = 1e-2
        slope = (loss(core + step) - loss(core - step)) / 2e-2
        assert slope == pytest.approx(float(gradient[place]), rel=1e-3, abs=1e-4)


def test_gradients_stay_within_the_frame(model, begun):
    write(model.module, begun)
    set_trainable(model.module, TRAINED)
    data = model.encode([Example("wound and fracture", "Surgery")], LABELS)
    norms = clipped_gradients(model.module, Plain(model, LABELS, data), [0], 1e6)
    whole = lora_layers(model.module)[LAYER].lora_B["current"].weight.grad
    frame = frame_of(begun.layers[LAYER])
    assert torch.allclose(frame @ (frame.T @ whole), whole, atol=1e-5)
    of_core = gradient_alone(model.module, Plain(model, LABELS, data), 0, core=True)
    gradient = of_core[f"{PREFIX}{LAYER}.lora_B.weight"]
    assert float(gradient.norm()) == pytest.approx(float(norms[0]), rel=1e-3)
    lora_layers(model.module)[LAYER].lora_B["current"].weight.grad = None


@pytest.mark.parametrize("length", [1.0, 30.0, 3000.0])
def test_whatever_the_frame_a_record_moves_the_sum_by_the_bound_at_most(model, begun, length):
    """The server sends the frame: as long as it likes, it must not stretch what is clipped."""
    layers = {}
    for name, factors in begun.layers.items():
        B = factors.B.clone()
        B[:, B.shape[1] // 2 :] *= length
        layers[name] = LoraFactors(factors.A, B)
    write(model.module, Adapter(layers, begun.scaling))
    set_trainable(model.module, TRAINED)
    data = model.encode([Example("wound and fracture", "Surgery")], LABELS)
    ids = [RecordId("task", 0)]
    made = NoisySum(data, ids, 1.0, 0.0, 1e-3, 3, SeededNoise(seeded("frame")))
    total = made.total(model.module, Plain(model, LABELS, data))
    squares = sum(float((part.astype(float) ** 2).sum()) for part in total.values())
    moved = squares**0.5 * grid_step(1e-3)
    assert 0.9e-3 < moved <= 1e-3
    write(model.module, begun)


def test_a_change_of_the_core_is_plain_lora(begun):
    core = draw(4, 4, seed=3).double()
    moved = changed(begun, {f"{PREFIX}{LAYER}.lora_B.weight": core}, core=True).layers[LAYER]
    factors = begun.layers[LAYER]
    expected = frame_of(factors) @ core.float() @ factors.A[:4]
    assert torch.allclose(moved.B @ moved.A, expected, atol=1e-5)
    assert torch.equal(frame_of(moved), frame_of(factors))
    assert torch.allclose(
        stack([begun, Adapter({LAYER: moved})]).layers[LAYER].B[:, -8:], moved.B, atol=1e-6
    )
    assert core_shape(factors) == (4, 4)
    assert from_core(core, factors).shape == factors.B.shape


def test_few_numbers_learn(model, begun):
    write(model.module, begun)
    set_trainable(model.module, TRAINED)
    assert entries_of(begun, TRAINED, core=True) == 16
    assert learnt_sizes(model.module) == learnt_shapes(begun, TRAINED, core=True)
