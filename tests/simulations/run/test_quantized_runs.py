"""Runs whose frozen weights have 8 or 4 bits."""

import pytest
import torch

from deal_core.config.experiment import AdapterConfig
from deal_core.data import Example
from deal_core.deal.objective import Plain
from deal_core.errors import UserError
from deal_core.inference.folder import find_adapter
from deal_core.inference.predictor import load_predictor
from deal_core.lora.adapter import orthogonal_init, zero_adapter
from deal_core.lora.attach import read, set_trainable, write
from deal_core.models import load_model
from deal_core.randomness import seeded
from server.results import read_results
from simulations.run.model_checks import check_names
from tests.deal_core.training.clipped import clipped_gradients
from tests.simulations.runs import accuracy_of, assert_same_run, learnt_adapter, simulated

pytest.importorskip("bitsandbytes")
WORDS = ("model.max_new_tokens=6", "train.max_length=24")


@pytest.fixture(scope="module")
def small(make_experiment, make_causal, tmp_path_factory):
    """Encoder and causal model, both with weights of few bits."""
    llama = make_causal(tmp_path_factory.mktemp("llama"), "llama")
    size = ("federation.rounds=1", "federation.clients=2", "data.max_train=16", "data.max_test=8")
    tasks = 'data.tasks=["medicine", "surgery"]'
    names = {
        "encoder": ("model.bits=4", 'train.precision="float32"'),
        "causal": ("model.bits=8", "model.family=causal-lm", f'model.name="{llama}"', *WORDS),
    }
    return {name: make_experiment(*size, tasks, *own) for name, own in names.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encoder", "causal"])
def test_a_run_learns_repeats_itself_and_is_predicted_from(small, name, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        simulated(small[name], folder)
    assert_same_run(first, second)
    found = read_results(first)
    assert any(part.any() for name, part in learnt_adapter(first).items() if "lora_B" in name)
    predictor = load_predictor(find_adapter(first))
    assert predictor.inference.model.bits == small[name].model.bits
    for task, accuracy in zip(("medicine", "surgery"), found.accuracy_matrix[-1], strict=True):
        assert accuracy_of(predictor, small[name], task) == accuracy


@pytest.mark.parametrize("bits", [8, 4])
def test_records_are_protected_as_with_whole_weights(small, tmp_path, bits):
    """What a record adds is its own gradient: the sum of all is that of torch's backward pass."""
    bits_of = small["encoder"].model.model_copy(update={"bits": bits})
    model = load_model(bits_of, AdapterConfig(rank=2), 16, torch.float32)
    shapes = read(model.module).shapes
    write(model.module, orthogonal_init(zero_adapter(shapes, 2), 2, 8.0, seeded(0)))
    parameters = set_trainable(model.module, frozenset({"lora_B"}))
    labels = ("skin", "heart")
    data = model.encode([Example("it itches", "skin"), Example("it beats fast", "heart")], labels)
    objective = Plain(model, labels, data)
    objective.example_losses([0]).sum().backward()
    one = torch.cat([p.grad.flatten() for p in parameters])
    objective.example_losses([1]).sum().backward()  # adds to it
    both = torch.cat([p.grad.flatten() for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    norms = clipped_gradients(model.module, objective, [0, 1], 10.0)
    ours = torch.cat([p.grad.flatten() for p in parameters])
    assert float((ours - both).norm() / both.norm()) < 1e-5
    assert float(norms[0]) == pytest.approx(float(one.norm()), rel=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_frozen_weights_take_less_memory(small, bits):
    def size(bits):
        model = small["encoder"].model.model_copy(update={"bits": bits})
        module = load_model(model, AdapterConfig(rank=1), 16, torch.float32).module
        inner = [
            p for n, p in module.named_parameters() if "encoder.layer" in n and "lora" not in n
        ]
        return sum(p.numel() * p.element_size() for p in inner)

    assert size(bits) < 1.1 * size(0) * bits / 32


def test_without_the_package_it_is_told_how_to_get_it(small, monkeypatch):
    import deal_core.models.loading as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"needs bitsandbytes.*pip install --editable '.\[quantized\]'"
    ):
        check_names(small["encoder"])
