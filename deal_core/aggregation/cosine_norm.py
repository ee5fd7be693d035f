"""Leave out clients whose model has a negative cosine to the round's start, and norm outliers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from deal_core.aggregation.norm_bound import change_norms
from deal_core.aggregation.robust import RoundStart, Survivors
from deal_core.aggregation.rule import ClientUpdate
from deal_core.lora.adapter import Adapter, LoraFactors

LONGEST = 4.0
"""Largest change, in medians over the clients of the round; honest skewed ones reach 2.6."""


def cosine_norm(updates: Sequence[ClientUpdate], start: RoundStart) -> Survivors:
    """Return the updates, as they came, that agree with the round's start and stay near it.

    **Turned**: ``<s_i B_i A_i, s B A> < 0`` over all layers, the client's product points away
    from the one it was sent. The reference is FLTrust's root of trust without a root data set:
    what all clients agreed on in earlier rounds, which nobody can sway in this one. Among each
    other skewed clients are no reference: honest ones oppose each other (cosines of their
    changes down to -0.7, the mean over others around 0), while against the start the smallest
    cosine of an honest client was 0.3 (research/lab-log.md, "Misbehaving
    clients"). Where the start tells
    nothing (zero, in the first round of a task; or half of the clients turn away from it, so it
    is the start that was wrong) the last verdict on a client stands.

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
    left_out = _turned(updates, start) | _leapt(updates, start.before)
    kept = tuple(update for update in updates if update.client not in left_out)
    return Survivors(kept, tuple(sorted(left_out)))


def _turned(updates: Sequence[ClientUpdate], start: RoundStart) -> frozenset[str]:
    agreement = {update.client: inner(update.adapter, start.before) for update in updates}
    opposed = frozenset(client for client, value in agreement.items() if value < 0)
    if any(agreement.values()) and 2 * len(opposed) < len(updates):
        return opposed
    known = start.distrusted & agreement.keys()
    return known if 2 * len(known) < len(updates) else frozenset()


def _leapt(updates: Sequence[ClientUpdate], before: Adapter) -> frozenset[str]:
    lengths = {u.client: math.hypot(*change_norms(u.adapter, before).values()) for u in updates}
    bound = LONGEST * statistics.median(lengths.values())
    if bound == 0:  # most have not moved, as where a task has one label: no measure
        return frozenset()
    return frozenset(client for client, length in lengths.items() if length > bound)


def inner(one: Adapter, other: Adapter) -> float:
    """Return ``<s_1 B_1 A_1, s_2 B_2 A_2>`` summed over layers: two ``r_1 x r_2`` Grams each."""
    total = sum(_inner(factors, other.layers[name]) for name, factors in one.layers.items())
    return one.scaling * other.scaling * total


def _inner(one: LoraFactors, other: LoraFactors) -> float:
    left, right = one.B.double().T @ other.B.double(), one.A.double() @ other.A.double().T
    return float((left * right).sum())
