"""The adapter that a run leaves: its size."""

from __future__ import annotations

from pathlib import Path

import torch

from deal_core.adapters import Adapter, LoraFactors, zero_adapter
from deal_core.config import Experiment
from deal_core.methods import State, make_method
from deal_core.models import adapter_shapes
from server.export import export_adapter


def learnt(adapter: Adapter, generator: torch.Generator) -> Adapter:
    """As if a task had been learnt: a ``lora_B`` of full rank."""
    layers = {
        name: LoraFactors(f.A, torch.randn(f.B.shape, generator=generator) / 100)
        for name, f in adapter.layers.items()
    }
    return Adapter(layers, adapter.scaling)


def test_ten_tasks_take_no_more_bytes_than_one(tmp_path: Path) -> None:
    """Of the default method on the embedded model, as a run exports it."""
    experiment, generator = Experiment(), torch.Generator().manual_seed(0)
    method = make_method(experiment.method, experiment.adapter)
    shapes = adapter_shapes(experiment.model, experiment.adapter)
    nothing = zero_adapter(shapes, experiment.adapter.retained_rank)
    state = State(zero_adapter(shapes, experiment.adapter.rank), nothing)
    sizes = []
    for task in range(10):
        begun = method.begin_task(state, generator)
        state = method.end_task(State(learnt(begun.current, generator), begun.retained))
        folder = tmp_path / str(task)
        export_adapter(folder, state, experiment)
        sizes.append((folder / "adapter_model.safetensors").stat().st_size)
    assert sizes == [sizes[0]] * 10
    assert sizes[0] < 3e6
