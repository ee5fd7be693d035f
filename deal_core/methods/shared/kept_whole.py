"""An adapter per task, all kept as they were learnt: the model grows by ``adapter.rank`` a task."""

from __future__ import annotations

import torch

from deal_core.lora.adapter import Adapter, LoraFactors, stack, zero_adapter
from deal_core.lora.state import State


def frozen_beside(state: State) -> State:
    """Return (server, at the end of a task) the same model: the task's adapter stands frozen beside
    the earlier ones, stacked in the retained one, and the current one is zero."""
    current = state.current
    nothing = zero_adapter(current.shapes, current.rank, current.scaling)
    return State(nothing, in_use(stack(state.parts())))


def in_use(adapter: Adapter) -> Adapter:
    """Leave out directions that change nothing: ``B`` zero in every layer; keep one at least."""
    used = torch.stack([f.B.any(dim=0) for f in adapter.layers.values()]).any(dim=0)
    used[0] |= not used.any()
    layers = {n: LoraFactors(f.A[used], f.B[:, used]) for n, f in adapter.layers.items()}
    return Adapter(layers, adapter.scaling)
