"""What privacy has cost, as updates and events say it; without torch, for who only reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict


class Spending(BaseModel):
    """What a client says of its noise and its ledger.

    Attributes:
        epsilon: of all that the ledger holds, at ``delta``.
        simulation_only: some noise came from a seed.
        noise_floor: spread that the noise leaves in an entry of the round's ``lora_B``.
    """

    model_config = ConfigDict(frozen=True)

    epsilon: float
    delta: float
    simulation_only: bool
    noise_floor: float


def spending_in(figures: Mapping[str, Any]) -> Spending | None:
    """What the figures of an update, or an event, say of it; None where they do not."""
    if not Spending.model_fields.keys() <= figures.keys():
        return None
    return Spending.model_validate(figures)
