"""What no number may do: end a run, or stay in the model."""

from __future__ import annotations

import math

from deal_core.aggregation.rule import Aggregate, Aggregation, AggregationFailed
from deal_core.errors import UserError
from deal_core.lora.adapter import Adapter

NUMERICAL = (ValueError, ArithmeticError, RuntimeError)
"""What linear algebra raises where numbers are beyond it: numpy's LinAlgError is a ValueError,
torch's a RuntimeError, as is a number that does not fit its type."""


def finished(aggregation: Aggregation) -> Aggregate:
    """Return the aggregate of a round, every number of it finite.

    Raises:
        AggregationFailed: it could not be computed, or is not finite.
        UserError: what the rule says to the user, as it is.
    """
    try:
        aggregate = aggregation.finish()
    except (AggregationFailed, UserError):
        raise
    except NUMERICAL as fault:
        raise AggregationFailed(one_line(fault)) from fault
    require_finite("the new adapter", aggregate.current)
    require_finite("its residual", aggregate.residual)
    if not all(math.isfinite(each) for each in (aggregate.error or 0.0, aggregate.lost)):
        raise AggregationFailed("the aggregation error is not finite")
    return aggregate


def require_finite(what: str, adapter: Adapter | None) -> None:
    """Check every number of an adapter; None has none.

    Raises:
        AggregationFailed: names ``what``, and the layer.
    """
    if adapter is None:
        return
    for name, factors in adapter.layers.items():
        if not (factors.A.isfinite().all() and factors.B.isfinite().all()):
            raise AggregationFailed(f"{what} is not finite ({name})")


def one_line(fault: Exception) -> str:
    """Return the kind of a fault and the first line of what it says, for the log."""
    kind = type(fault).__name__.lstrip("_")
    return f"{kind}: {str(fault).partition(chr(10))[0][:200]}"
