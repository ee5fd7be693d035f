"""Whether every task finds directions that earlier ones have left free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from deal_core.config.experiment import Experiment
from deal_core.data import open_source
from deal_core.lora.adapter import Adapter, LoraFactors, row_basis, zero_adapter
from deal_core.lora.state import State
from deal_core.methods import Method, method_of
from deal_core.models import adapter_shapes
from deal_core.randomness import seeded
from server.plan import make_plan

Shapes = Mapping[str, tuple[int, int]]


def check_room(experiment: Experiment) -> None:
    """Let the method lay out all stages of the stream in the narrowest layer, on factors that are
    drawn instead of learnt, where they could take more directions than it has inputs.

    Args:
        experiment: its data can be read.

    Raises:
        UserError: a stage finds no room.
    """
    clients = [str(number) for number in range(experiment.federation.clients)]
    tasks = open_source(experiment.data, experiment.privacy.unit_column).task_names()
    stages = len(make_plan(experiment, tasks, clients).stages)
    shapes = adapter_shapes(experiment.model, experiment.adapter)
    name, (_, d_in) = min(shapes.items(), key=lambda each: each[1][1])
    if experiment.adapter.rank * stages > d_in:
        _lay_out(method_of(experiment), stages, {name: shapes[name]})


def _lay_out(method: Method, stages: int, shapes: Shapes) -> None:
    """Begin and end so many stages, or as many as take more directions."""
    generator, taken = seeded("room"), -1
    state = State(zero_adapter(shapes, 1), zero_adapter(shapes, 1))
    for _ in range(stages):
        begun = method.begin_task(state, generator)
        state = method.end_task(replace(begun, current=_drawn(begun.current, generator)))
        rows = next(iter(state.retained.layers.values())).A
        before, taken = taken, len(row_basis(rows))
        if taken == before:
            return


def _drawn(adapter: Adapter, generator: torch.Generator) -> Adapter:
    """Return an adapter of the same rows ``A``, whose ``B`` has learnt something."""
    layers = {
        name: LoraFactors(f.A, torch.randn(f.B.shape, generator=generator))
        for name, f in adapter.layers.items()
    }
    return Adapter(layers, adapter.scaling)
