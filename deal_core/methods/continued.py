"""One adapter for all tasks: each task goes on training what the task before left."""

from __future__ import annotations

import torch

from deal_core.adapters import Adapter, LoraFactors, compress, fresh_adapter, stack, zero_adapter
from deal_core.config import AdapterConfig
from deal_core.methods.interface import State


def continued(state: State, config: AdapterConfig, generator: torch.Generator) -> State:
    """Keep the state; draw the adapter before the first task."""
    if any(bool(factors.A.any()) for factors in state.current.layers.values()):
        return state
    scaling = config.lora_alpha / config.rank
    current = fresh_adapter(state.retained, config.rank, scaling, generator)
    return State(current, state.retained, state.residual)


def with_start_in_sight(state: State) -> State:
    """Show the clients the adapter as the task starts from it, and leave the model as it is.

    During a task clients see a current adapter that moves, but the teacher and the controlled
    update need the model at the start of the task, ``base + retained``. So the start is put
    into ``retained`` and taken off again in ``residual``: retained + residual + current is the
    current adapter. Exact where the retained rank is not below the rank.
    """
    start = compress(state.current, state.retained.rank)
    if not any(bool(factors.B.any()) for factors in start.layers.values()):
        return state
    taken_off = {name: LoraFactors(f.A, -f.B) for name, f in start.layers.items()}
    return State(state.current, start, Adapter(taken_off))


def one_adapter(state: State) -> State:
    """Undo :func:`with_start_in_sight`: the current adapter holds everything.

    It stays as it is, unless the aggregation rule put part of the task beside it: then it
    becomes the best adapter of its rank for the sum.
    """
    nothing = zero_adapter(state.retained.shapes, state.retained.rank)
    taken_off = any(bool(factors.B.any()) for factors in state.retained.layers.values())
    own_rank = state.retained.rank if taken_off else 0
    if state.residual is None or state.residual.rank == own_rank:
        return State(state.current, nothing)
    best = compress(stack(state.parts()), state.current.rank)
    scaling = state.current.scaling
    layers = {name: LoraFactors(f.A, f.B / scaling) for name, f in best.layers.items()}
    return State(Adapter(layers, scaling), nothing)
