"""Local steps on cores, against torch's own AdamW on ``R`` in ``W + s F R A``."""

from __future__ import annotations

import pytest
import torch

from deal_core.config.experiment import AdapterConfig, ModelConfig, TrainConfig
from deal_core.data import Example
from deal_core.lora.adapter import zero_adapter
from deal_core.lora.attach import lora_layers, read, write
from deal_core.lora.core import begin_core, frame_of
from deal_core.lora.state import State
from deal_core.methods.shared.plain import Plain
from deal_core.models import load_model
from deal_core.randomness import seeded
from deal_core.training.loop import load_state, run_local_steps
from deal_core.training.nonprivate_gradients import NonPrivateGradients
from deal_core.training.public_gradients import public_gradients

LAYER = "encoder.layer.5.output.dense"
LABELS = ("Pathology", "Surgery", "Pharmacology")
TEXTS = [
    Example("wound and fracture", "Surgery"),
    Example("dose of a drug", "Pharmacology"),
    Example("a tumour under the microscope", "Pathology"),
]
SIZE, SCALING, RATE, STEPS = 4, 2.0, 0.05, 3


@pytest.fixture(scope="module")
def model():
    config = AdapterConfig(
        kind="core", rank=2 * SIZE, lora_alpha=16, target_modules=("5.output.dense",)
    )
    return load_model(ModelConfig(), config, 32)


@pytest.fixture(scope="module")
def begun(model):
    nothing = zero_adapter(read(model.module).shapes, 2 * SIZE, SCALING)
    gradients = public_gradients(model, State(nothing, nothing), LABELS)
    return begin_core(nothing, gradients, nothing)


def trained(model, begun, epochs: int):
    load_state(model, State(begun, zero_adapter(begun.shapes, 1)))
    data = model.encode(TEXTS, LABELS)
    config = TrainConfig(learning_rate=RATE, batch_size=len(data), weight_decay=0.0)
    gradients = NonPrivateGradients(data, epochs, config, seeded("order"))
    objective = Plain(model, LABELS, data)
    run_local_steps(model, objective, gradients, frozenset({"lora_B"}), config)
    return read(model.module)


def expected_core(model, begun) -> torch.Tensor:
    """``R`` after the same steps, with nothing of ours between the weight and its gradient."""
    factors = begun.layers[LAYER]
    F, A = frame_of(factors), factors.A[:SIZE]
    layer = lora_layers(model.module)[LAYER]
    base, forward = layer.base_layer, layer.forward
    core = torch.zeros(SIZE, SIZE, requires_grad=True)
    optimizer = torch.optim.AdamW([core], lr=RATE, weight_decay=0.0)

    def moved(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, base.weight + SCALING * F @ core @ A, base.bias)

    load_state(model, State(begun, zero_adapter(begun.shapes, 1)))
    data = model.encode(TEXTS, LABELS)
    layer.forward = moved
    try:
        for _ in range(STEPS):
            optimizer.zero_grad()
            model.forward_train(data, LABELS, ()).example_losses.mean().backward()
            optimizer.step()
    finally:
        layer.forward = forward
    return core.detach()


def test_steps_are_those_of_adamw_on_the_core(model, begun):
    found = trained(model, begun, STEPS).layers[LAYER]
    core = expected_core(model, begun)
    assert float(core.abs().max()) > RATE
    expected = frame_of(begun.layers[LAYER]) @ core
    torch.testing.assert_close(found.B[:, :SIZE], expected, rtol=1e-3, atol=1e-4)


def test_what_is_learnt_stays_between_the_frozen_factors(model, begun):
    before, after = begun.layers[LAYER], trained(model, begun, STEPS).layers[LAYER]
    assert torch.equal(after.A, before.A)
    assert torch.equal(frame_of(after), frame_of(before))
    frame, learnt = frame_of(after), after.B[:, :SIZE]
    assert float(learnt.norm()) > 0.1
    assert float((frame @ (frame.T @ learnt) - learnt).norm()) < 1e-6 * float(learnt.norm())


def test_a_later_round_goes_on_from_the_core_that_it_was_sent(model, begun):
    once = trained(model, begun, 1)
    again = trained(model, once, 1).layers[LAYER]
    step = (again.B - once.layers[LAYER].B)[:, :SIZE]
    core = frame_of(again).T @ step
    # A new optimiser's first step is the rate in every entry that has a gradient.
    assert float(core.abs().max()) == pytest.approx(RATE, rel=1e-2)
    write(model.module, begun)
