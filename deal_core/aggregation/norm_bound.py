"""A bound on how far one client may move one layer in a round: refuse, or clip."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from deal_core.aggregation.gauge import square_norm
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


def clip_to(update: ClientUpdate, before: Adapter, bound: float) -> ClientUpdate:
    """Return the update with every layer's change at most ``bound`` (0: no bound).

    A layer beyond the bound is moved back towards ``before`` along the line between the
    factors, ``B + t (B_i - B)``, ``A + t (A_i - A)``, to the ``t`` where the norm of the change
    is the bound. A common factor stays common, and then ``t = bound / norm``.

    Raises:
        ValueError: rank or scaling differ from ``before``'s; refuse instead.
    """
    if not bound:
        return update
    adapter = update.adapter
    if (adapter.rank, adapter.scaling) != (before.rank, before.scaling):
        raise ValueError(f"client {update.client}: another rank or scaling cannot be clipped")
    layers = {
        name: _clipped(adapter.layers[name], start, adapter.scaling, bound)
        for name, start in before.layers.items()
    }
    return replace(update, adapter=Adapter(layers, adapter.scaling))


def _change(adapter: Adapter, before: Adapter, name: str) -> LoraFactors:
    new, old = adapter.layers[name], before.layers[name]
    return LoraFactors(
        torch.cat([new.A.double(), old.A.double()]),
        torch.cat([adapter.scaling * new.B.double(), -before.scaling * old.B.double()], dim=1),
    )


def _clipped(new: LoraFactors, old: LoraFactors, scaling: float, bound: float) -> LoraFactors:
    """The change at ``t`` is ``s (t P + t^2 Q)``, ``P = D A + B E``, ``Q = D E``."""
    drift_a, drift_b = new.A.double() - old.A.double(), new.B.double() - old.B.double()
    a = torch.cat([old.A.double(), drift_a])
    b = torch.cat([drift_b, old.B.double()], dim=1)

    def norm(t: float) -> float:
        rank = drift_a.shape[0]
        step = torch.cat([a[:rank] + t * drift_a, a[rank:]])
        return scaling * t * math.sqrt(square_norm(LoraFactors(step, b)))

    if norm(1.0) <= bound:
        return new
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if norm(middle) <= bound else (low, middle)
    return LoraFactors(_toward(old.A, drift_a, low), _toward(old.B, drift_b, low))


def _toward(start: Tensor, drift: Tensor, t: float) -> Tensor:
    return (start.double() + t * drift).to(start.dtype)
