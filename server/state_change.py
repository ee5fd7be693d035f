"""From one state of the run to the next: the residual joins it, and clients must take all of it."""

from __future__ import annotations

from dataclasses import replace

from deal_core.aggregation import Aggregate, AggregationFailed, one_line, require_finite
from deal_core.errors import UserError
from deal_core.lora.adapter import compress, stack
from deal_core.lora.state import State
from deal_core.wire.adapter_record import require_bounded


def fold_residual(state: State, aggregate: Aggregate) -> State:
    """Return the state after a round: what the current adapter cannot hold joins the residual,
    whose rank stays below the layers' own."""
    gained = [part for part in (state.residual, aggregate.residual) if part is not None]
    if not gained:
        return replace(state, current=aggregate.current)
    residual = stack(gained)
    full = max(min(shape) for shape in residual.shapes.values())
    if residual.rank > full:
        residual = compress(residual, full)
    return replace(state, current=aggregate.current, residual=residual)


def sendable(state: State) -> State:
    """Return the state itself: no client would refuse it.

    Raises:
        AggregationFailed: some number of it is not finite, or too large for a model.
    """
    require_finite("the current adapter", state.current)
    require_finite("the retained adapter", state.retained)
    require_finite("the residual", state.residual)
    for name, part in (("a head", state.heads), ("a sum", state.sums)):
        if any(not bool(value.isfinite().all()) for value in part.values()):
            raise AggregationFailed(f"{name} is not finite")
    for adapter in (state.current, state.retained, state.residual):
        if adapter is not None:
            require_bounded(adapter)
    return state


def reason_of(fault: Exception) -> str:
    """Return what failed, for the log."""
    told = isinstance(fault, (AggregationFailed, UserError))  # a line for people already
    return str(fault) if told else one_line(fault)
