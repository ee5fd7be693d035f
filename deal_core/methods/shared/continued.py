"""One adapter for all tasks: each task goes on training what the task before left."""

from __future__ import annotations

from dataclasses import replace

import torch

from deal_core.config.experiment import AdapterConfig
from deal_core.lora.adapter import orthogonal_init, zero_adapter
from deal_core.lora.state import State


def continued(state: State, config: AdapterConfig, generator: torch.Generator) -> State:
    """Return the same state; before the first task one with a drawn adapter. Nothing is retained,
    and next to nothing travels for it."""
    if any(bool(factors.A.any()) for factors in state.current.layers.values()):
        return state
    scaling = config.lora_alpha / config.rank
    current = orthogonal_init(state.retained, config.rank, scaling, generator)
    nothing = zero_adapter(state.retained.shapes, 1)
    return replace(state, current=current, retained=nothing, num_reference_directions=0)
