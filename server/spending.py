"""What privacy has cost, as updates and events say it; without torch, for who only reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import ROUND_CEILING, Decimal
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Spending(BaseModel):
    """What a client says of its noise and its ledger.

    Attributes:
        epsilon: of all that the ledger holds, at ``delta``.
        n_delta: ``delta`` times the number of its records, or groups; None: the client does not
            say.
        disjoint_tasks: no record is in two tasks, so that they compose in parallel.
        void: something of training records has left without protection, so that for these no
            epsilon holds.
        assumes_more: it counts on others than this run's settings say: earlier releases do, or the
            site takes the keys of other sites from the server.
        simulation_only: some noise came from a seed.
    """

    model_config = ConfigDict(frozen=True)

    epsilon: float = Field(ge=0)
    delta: float = Field(ge=0, le=1)
    n_delta: float | None = Field(None, ge=0)
    simulation_only: bool
    disjoint_tasks: bool = False
    void: bool = False
    assumes_more: bool = False


def extent(disjoint_tasks: bool) -> str:
    """What an epsilon composes over, in words."""
    return "all rounds, a record being in one task" if disjoint_tasks else "all rounds and tasks"


EARLIER = ", and whatever the client's ledger held before"
MORE_TRUST = "and on more, which the certificate of a client's ledger names"
"""Behind whom a run's settings count on, where a client has said that its ledger counts on more."""
VOID = "void for records of which a client has released something without protection"


def whole_extent(disjoint_tasks: bool) -> str:
    """Return all that an epsilon composes over, in words: the run, and what stands beside it."""
    return f"{extent(disjoint_tasks)}{EARLIER}"


def whole_trust(assumes: str, more: bool) -> str:
    """Return whom an epsilon takes to be honest, in words: whom the run's settings say, and that it
    counts on ``more``."""
    return f"{assumes}, {MORE_TRUST}" if more else assumes


def rounded_up(value: float, digits: int) -> str:
    """Return a number with so many significant digits, and never a smaller one: "at most" is
    true of it."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    last = math.floor(math.log10(abs(value))) + 1 - digits
    step = Decimal(1).scaleb(last)
    up = Decimal(repr(value)).quantize(step, rounding=ROUND_CEILING)
    return f"{float(up):.{digits}g}"


def spending_told(event: Mapping[str, Any]) -> Spending | None:
    """Return what an event says of privacy; None where it says nothing, or what cannot be, as older
    servers let clients do."""
    try:
        return spending_in(event)
    except ValueError:
        return None


def spending_in(figures: Mapping[str, Any]) -> Spending | None:
    """Return what the figures of an update, or an event, say of privacy; None where they do not.

    Raises:
        ValueError: they say what cannot be, or half of it.
    """
    if not {"epsilon", "delta"} & figures.keys():
        return None
    return Spending.model_validate(figures)
