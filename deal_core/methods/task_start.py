"""The model at the start of a task, held inside the state of a method that goes on training.

Everywhere ``base + retained`` is the model at the start of the task. A method that trains one
adapter on and on has it in the current adapter, which moves. So the start is copied into the
retained adapter for the length of the task, and the residual takes the copy back:

    ``retained = start``, ``residual = -start``, and the sum is what it was.

Every client of every round then knows the start, whenever it first takes part, and nothing but
adapters travels. What exact rules add to the residual during the task follows after these rows.

``continued.with_start_in_sight`` shows the start compressed to the retained rank, and folds back
into one adapter; here the start has the very factors of the adapter, which ``ewc`` compares, and
nothing is cut whatever the ranks.
"""

from __future__ import annotations

from deal_core.adapters import Adapter, LoraFactors, split, stack, zero_adapter
from deal_core.methods.interface import State


def hold_start(state: State) -> State:
    """Server, at the start of a task: the same model, whose start is ``base + retained``.

    Args:
        state: its retained adapter is zero.
    """
    current = state.current
    start = stack([current] if state.residual is None else [current, state.residual])
    return State(current, start, _negative(current))


def release_start(state: State, retained_rank: int) -> State:
    """Server, at the end of the task: undo :func:`hold_start`, to the bit.

    What exact rules found no room for, in this task and before, is the residual again.
    """
    rank = state.current.rank
    held = [part for part in (state.retained, state.residual) if part is not None]
    left = [split(part, rank)[1] for part in held if part.rank > rank]
    retained = zero_adapter(state.current.shapes, retained_rank)
    return State(state.current, retained, stack(left) if left else None)


def start_of(state: State) -> State:
    """The state at the start of the task, at any time during it."""
    held, scaling = split(state.retained, state.current.rank)[0], state.current.scaling
    layers = {n: LoraFactors(f.A, f.B / scaling) for n, f in held.layers.items()}
    current = Adapter(layers, scaling)
    return State(current, state.retained, _negative(current))


def _negative(adapter: Adapter) -> Adapter:
    """The adapter (scaling 1) that takes the given one back."""
    scaling = adapter.scaling
    return Adapter({n: LoraFactors(f.A, -scaling * f.B) for n, f in adapter.layers.items()})
