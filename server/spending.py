"""What privacy has cost, as updates and events say it; without torch, for who only reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

LARGEST_FLOOR = 1e6
"""Of an entry of a factor: no learning rate leads near it, and its square is a number."""


class Spending(BaseModel):
    """What a client says of its noise and its ledger.

    Attributes:
        epsilon: of all that the ledger holds, at ``delta``.
        disjoint_tasks: no record is in two tasks, so that they compose in parallel.
        simulation_only: some noise came from a seed.
        noise_floor: spread that the noise leaves in an entry of the round's ``lora_B``; 0: the
            client does not say.
    """

    model_config = ConfigDict(frozen=True)

    epsilon: float = Field(ge=0)
    delta: float = Field(ge=0, le=1)
    simulation_only: bool
    noise_floor: float = Field(0.0, ge=0, le=LARGEST_FLOOR)
    disjoint_tasks: bool = False


def extent(disjoint_tasks: bool) -> str:
    """What an epsilon composes over, in words."""
    return "all rounds, a record being in one task" if disjoint_tasks else "all rounds and tasks"


def spending_in(figures: Mapping[str, Any]) -> Spending | None:
    """Return what the figures of an update, or an event, say of privacy; None where they do not.

    Raises:
        ValueError: they say what cannot be, or half of it.
    """
    if not {"epsilon", "delta"} & figures.keys():
        return None
    return Spending.model_validate(figures)
