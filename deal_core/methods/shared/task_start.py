"""The model at the start of a task, held inside the state of a method that goes on training.

Everywhere ``base + retained`` is the model at the start of the task. A method that trains one
adapter on and on has it in the current adapter, which moves. So the start is copied into the
retained adapter for the length of the task, and the state counts its directions
(``num_reference_directions``): they are there to be seen, and no part of the model. Every client of
every round then knows the start, whenever it first takes part, and nothing but adapters travels.

The start has the very factors of the adapter, which ``ewc`` compares; behind them stands what
exact rules found no room for in earlier tasks, which *is* part of the model.
"""

from __future__ import annotations

from dataclasses import replace

from deal_core.lora.adapter import Adapter, LoraFactors, split, stack, zero_adapter
from deal_core.lora.state import State


def snapshot_task_start(state: State) -> State:
    """Return (server, at the start of a task) the same model, whose start is ``base + retained``.

    Args:
        state: its retained adapter is zero.
    """
    current = state.current
    start = stack([current] if state.residual is None else [current, state.residual])
    return replace(state, retained=start, residual=None, num_reference_directions=current.rank)


def drop_task_start(state: State) -> State:
    """Return (server, at the end of the task) the state before :func:`snapshot_task_start`.

    What exact rules found no room for, in this task and before, is the residual again.
    """
    left = state.parts()[:-1]
    nothing = zero_adapter(state.current.shapes, 1)
    return replace(
        state,
        retained=nothing,
        residual=stack(left) if left else None,
        num_reference_directions=0,
    )


def start_of(state: State) -> State:
    """Return the state at the start of the task, at any time during it."""
    held, scaling = split(state.retained, state.num_reference_directions)[0], state.current.scaling
    layers = {n: LoraFactors(f.A, f.B / scaling) for n, f in held.layers.items()}
    return replace(state, current=Adapter(layers, scaling), residual=None)
