"""A robust step before any aggregation rule: who turns the model around, or leaps, is left out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

import torch

from deal_core.aggregation.rule import Aggregate, ClientUpdate, Rule, check_update
from deal_core.aggregation.running import ErrorMeter, square_norm
from deal_core.lora.adapter import Adapter, LoraFactors

LONGEST = 4.0
"""Largest change, in medians over the clients of the round; honest skewed ones reach 2.6."""


def cosine_norm(base: Rule, distrusted: frozenset[str]) -> Rule:
    """Return the rule that sees only the updates of a round that :func:`left_out` does not name.

    ``Aggregate.error`` keeps its meaning, the distance from the weighted mean of *all* updates
    of the round: 0 when nothing had to be resisted, large when an outlier was. It needs every
    update of the round in memory. ``distrusted``: clients that were left out when they were last
    judged.
    """
    return replace(base, begin=lambda before: _Round(base, distrusted, before))


class _Round:
    def __init__(self, rule: Rule, distrusted: frozenset[str], before: Adapter) -> None:
        self._rule, self._distrusted, self._before = rule, distrusted, before
        self._base = rule.begin(before)
        self._updates: list[ClientUpdate] = []

    def add(self, update: ClientUpdate) -> None:
        check_update(update, self._before, self._rule.trained, self._rule.mixed_ranks)
        self._updates.append(update)

    def finish(self) -> Aggregate:
        if not self._updates:
            raise ValueError("no client update to aggregate")
        excluded = left_out(self._updates, self._before, self._distrusted)
        meter = ErrorMeter(self._before.shapes)
        for update in self._updates:
            meter.add(update.adapter, update.weight)
            if update.client not in excluded:
                self._base.add(update)
        result = self._base.finish()
        error = meter.read(result.current, result.residual)
        return replace(result, error=error, excluded=tuple(sorted(excluded)))


def left_out(
    updates: Sequence[ClientUpdate], before: Adapter, distrusted: frozenset[str] = frozenset()
) -> frozenset[str]:
    """Return the clients whose model turns away from the round's start, or leaps from it.

    **Turned**: ``<s_i B_i A_i, s B A> < 0`` over all layers, the client's product points away
    from the one it was sent. The reference is FLTrust's root of trust without a root data set:
    what all clients agreed on in earlier rounds, which nobody can sway in this one. Among each
    other skewed clients are no reference: honest ones oppose each other (cosines of their
    changes down to -0.7, the mean over others around 0), while against the start the smallest
    cosine of an honest client was 0.3 (research/lab-log.md, "Misbehaving clients"). Where the start
    tells nothing (zero, in the first round of a task; or half of the clients turn away from it, so
    it is the start that was wrong) the last verdict on a client stands.

    **Leapt**: ``||s_i B_i A_i - s B A||`` over all layers is more than four times the median of
    the clients. A site with very much more data than most may be honest and yet too long.

    It cannot see a reversed update of ordinary length in the first round of the first task, nor
    one that undoes less than what it was sent. Rules whose start is always zero (``flora``) and
    runs of one round a task get the bound on length alone. Weights are the clients' own claims,
    as beneath. Less than half of the clients are left out for either reason, so one at least
    stays. Linear in the number of clients, any rank, whatever the order.

    Sources: docs/method.md (M26); Cao et al., NDSS 2021, arXiv 2012.13995 (FLTrust: a negative
    cosine gets trust 0); Sun et al. 2019, arXiv 1911.07963 (bound on the norm); Karimireddy et al.,
    ICML 2021, arXiv 2012.10333 (who is judged by one round alone can hide in its noise: use
    history).
    """
    agreement = {update.client: inner(update.adapter, before) for update in updates}
    turned = {client for client, value in agreement.items() if value < 0}
    if not any(agreement.values()) or 2 * len(turned) >= len(updates):  # the start tells nothing
        known = distrusted & agreement.keys()
        turned = set(known) if 2 * len(known) < len(updates) else set()
    lengths = {u.client: math.hypot(*change_norms(u.adapter, before).values()) for u in updates}
    bound = LONGEST * statistics.median(lengths.values())
    if bound == 0:  # most have not moved, as where a task has one label: no measure
        return frozenset(turned)
    return frozenset(turned | {client for client, length in lengths.items() if length > bound})


def change_norms(adapter: Adapter, before: Adapter) -> dict[str, float]:
    """Return ``||s_i B_i A_i - s B A||_F`` of every layer: what the client changed in the round.

    Computed on factors, any rank. Raises KeyError when the layers differ.
    """
    return {name: math.sqrt(square_norm(_change(adapter, before, name))) for name in before.layers}


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


def inner(one: Adapter, other: Adapter) -> float:
    """Return ``<s_1 B_1 A_1, s_2 B_2 A_2>`` summed over layers: two ``r_1 x r_2`` Grams each."""
    total = 0.0
    for name, f in one.layers.items():
        g = other.layers[name]
        total += float(((f.B.double().T @ g.B.double()) * (f.A.double() @ g.A.double().T)).sum())
    return one.scaling * other.scaling * total
