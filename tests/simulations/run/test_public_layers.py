"""``deal layers``: what a core could take hold of, layer by layer, on public names alone."""

from __future__ import annotations

import io
import json
import tomllib

import pytest
import torch
from rich.console import Console

from deal_core.config.experiment import AdapterConfig, Experiment, ModelConfig
from deal_core.errors import UserError
from deal_core.lora.adapter import zero_adapter
from deal_core.lora.attach import read
from deal_core.lora.core import begin_core, core_shape, frame_of
from deal_core.lora.state import State
from deal_core.models import adapter_shapes, load_model
from deal_core.models.linear_layers import linear_layers, shortest_end
from deal_core.training.public_gradients import public_gradients
from simulations.run.experiment import Request
from simulations.run.public_layers import core_shares, print_layers, public_layers
from tests.architectures import WORKING, model_config, save

LABELS = {"pharmacology": ["Heparin", "Aspirin", "Warfarin"], "heart": ["Angina", "Infarction"]}


def small(**adapter: object) -> Experiment:
    return Experiment.model_validate(
        {
            "adapter": {"kind": "core", "rank": 8} | adapter,
            "train": {"max_length": 32},
            "data": {"source": "sites", "tasks": list(LABELS), "labels": LABELS},
        }
    )


def test_a_share_is_what_a_core_of_that_layer_takes_hold_of() -> None:
    """Against the core itself: what of the gradient lies between its two frozen factors."""
    name = "5.output.dense"
    adapter = AdapterConfig(kind="core", rank=8, target_modules=(name,))
    model = load_model(ModelConfig(), adapter, 32)
    nothing = zero_adapter(read(model.module).shapes, 8)
    found = {layer.name: layer for layer in public_layers(small())}
    seen = 0.0
    for labels in LABELS.values():
        gradients = public_gradients(model, State(nothing, nothing), labels)
        ((_, gradient),) = gradients.items()
        ((_, factors),) = begin_core(nothing, gradients, nothing).layers.items()
        size = core_shape(factors)[0]
        within = frame_of(factors).T @ gradient @ factors.A[:size].T
        seen += float(within.square().sum() / gradient.square().sum())
        assert found[name].numbers == size * size
    whole = core_shares({name: torch.eye(2)}, 2)[name]
    assert whole == pytest.approx(1)
    # Of the layer's own gradient a core of four directions takes nearly all; of the model's, less.
    assert 0 < found[name].share < seen / len(LABELS)


def test_shares_fall_and_are_of_one_whole() -> None:
    layers = public_layers(small(rank=768))  # 384 directions: every layer's whole gradient
    shares = [layer.share for layer in layers]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1, abs=1e-6)
    assert len({layer.name for layer in layers}) == len(layers) == 36


def test_a_gradient_of_one_direction_is_one_share() -> None:
    one = torch.outer(torch.arange(1.0, 4.0), torch.ones(2))
    shares = core_shares({"one": one, "two": 2 * torch.eye(3)}, 1)
    squares = float(one.square().sum())
    assert shares["one"] == pytest.approx(squares / (squares + 12))
    assert shares["two"] == pytest.approx(4 / (squares + 12))


def test_the_table_that_is_printed_can_be_pasted(tmp_path) -> None:
    file = tmp_path / "my.toml"
    named = {task: list(labels) for task, labels in LABELS.items()}
    lines = [f"{task} = {json.dumps(labels)}" for task, labels in named.items()]
    file.write_text('[data]\nsource = "sites"\n[data.labels]\n' + "\n".join(lines))
    console = Console(file=io.StringIO(), width=100)
    print_layers(Request(str(file), overrides=("adapter.rank=6",)), 2, console)
    pasted = console.file.getvalue().partition("[adapter]")[1:]
    table = tomllib.loads("".join(pasted))["adapter"]
    assert (table["kind"], table["rank"]) == ("core", 6)
    expected = [layer.name for layer in public_layers(small(rank=6))[:2]]
    assert table["target_modules"] == expected


def test_no_labels_is_one_line() -> None:
    data = {"source": "sites", "tasks": ["rewrite"], "generation": ["rewrite"]}
    with pytest.raises(UserError, match="no task has labels"):
        public_layers(small().model_copy(update={"data": type(small().data)(**data)}))


def test_ends_mean_one_layer() -> None:
    names = ["layer.1.output.dense", "layer.1.attention.output.dense", "layer.11.output.dense"]
    assert shortest_end(names[0], names) == "1.output.dense"
    assert shortest_end(names[1], names) == "attention.output.dense"
    assert shortest_end("head", ["head", *names]) == "head"


@pytest.mark.parametrize("kind", WORKING)
def test_each_name_of_each_architecture_puts_an_adapter_on_that_layer(kind, tmp_path) -> None:
    config = model_config(save(tmp_path, kind), kind)
    names = linear_layers(config)
    assert names
    for name, end in names.items():
        assert list(adapter_shapes(config, AdapterConfig(target_modules=(end,)))) == [name]


def test_a_model_that_answers_in_words_is_looked_at_too(tmp_path) -> None:
    kind = "llama"
    config = model_config(save(tmp_path, kind), kind)
    labels = {"colours": ["red", "blue"]}
    data = type(small().data)(source="sites", tasks=("colours",), labels=labels)
    layers = public_layers(small().model_copy(update={"model": config, "data": data}))
    assert sorted(layer.name for layer in layers) == sorted(linear_layers(config).values())
    assert 0 < sum(layer.share for layer in layers) <= 1 + 1e-6
