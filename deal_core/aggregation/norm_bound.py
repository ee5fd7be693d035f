"""A bound on how far one client may move one layer in a round: refuse, or clip."""

from __future__ import annotations

import math

import torch

from deal_core.aggregation.aggregation_error import square_norm
from deal_core.aggregation.rule import ClientUpdate
from deal_core.lora.adapter import Adapter, LoraFactors
from deal_core.lora.payload import PayloadError

BISECTIONS = 60


def change_norms(adapter: Adapter, before: Adapter) -> dict[str, float]:
    """Return ``||s_i B_i A_i - s B A||_F`` of every layer: what the client changed in the round.

    Computed on factors, any rank. Raises KeyError when the layers differ.
    """
    return {name: math.sqrt(square_norm(_change(adapter, before, name))) for name in before.layers}


def refuse_beyond(update: ClientUpdate, before: Adapter, bound: float) -> None:
    """Refuse an update that changes a layer by more than ``bound`` (0: no bound).

    Raises:
        PayloadError: names the layer.
    """
    if not bound:
        return
    for name, norm in change_norms(update.adapter, before).items():
        if not norm <= bound:
            raise PayloadError(f"{name}: the update exceeds the norm bound {bound:g}")


def _change(adapter: Adapter, before: Adapter, name: str) -> LoraFactors:
    new, old = adapter.layers[name], before.layers[name]
    return LoraFactors(
        torch.cat([new.A.double(), old.A.double()]),
        torch.cat([adapter.scaling * new.B.double(), -before.scaling * old.B.double()], dim=1),
    )
