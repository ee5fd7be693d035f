"""A bound on how far one client may move one layer in a round: refuse, or clip."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from deal_core.aggregation.aggregation_error import square_norm
from deal_core.aggregation.rule import ClientUpdate
from deal_core.lora.adapter import Adapter, LoraFactors
from deal_core.lora.payload import PayloadError

BISECTIONS = 30
"""A part of a change is known to 1e-9."""


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


def shortened(adapter: Adapter, before: Adapter, bound: float) -> Adapter:
    """Return the adapter with the change of each layer cut to at most ``bound``: of a layer whose
    change is longer, its factors go a part of their way.

    Args:
        adapter: of the layers, ranks and scaling of ``before``.
        before: what the round began from.
        bound: on ``||s B_i A_i - s B A||_F``, positive.
    """
    layers = {}
    for name, start in before.layers.items():
        end = adapter.layers[name]

        def at(part: float, start: LoraFactors = start, end: LoraFactors = end) -> LoraFactors:
            return LoraFactors(
                torch.lerp(start.A.double(), end.A.double(), part).float(),
                torch.lerp(start.B.double(), end.B.double(), part).float(),
            )

        def norm(factors: LoraFactors, name: str = name) -> float:
            one = Adapter({name: factors}, adapter.scaling)
            return math.sqrt(square_norm(_change(one, before, name)))

        layers[name] = end if norm(end) <= bound else at(_largest_part(at, norm, bound))
    return Adapter(layers, adapter.scaling)


def _largest_part(
    at: Callable[[float], LoraFactors], norm: Callable[[LoraFactors], float], bound: float
) -> float:
    """A part of the way, from 0 to 1, up to which a change is within the bound."""
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if norm(at(middle)) <= bound else (low, middle)
    return low


def _change(adapter: Adapter, before: Adapter, name: str) -> LoraFactors:
    """Return what a client changed of a layer; where rank and scaling are the same as
    ``s [dB, B] [A_i; dA]``, which is 0 to the bit if nothing changed."""
    new, old = adapter.layers[name], before.layers[name]
    if new.A.shape == old.A.shape and adapter.scaling == before.scaling:
        a, b = new.A.double(), old.B.double()
        return LoraFactors(
            torch.cat([a, a - old.A.double()]),
            adapter.scaling * torch.cat([new.B.double() - b, b], dim=1),
        )
    return LoraFactors(
        torch.cat([new.A.double(), old.A.double()]),
        torch.cat([adapter.scaling * new.B.double(), -before.scaling * old.B.double()], dim=1),
    )
