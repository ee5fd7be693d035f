"""Direction: leave out who turns the model around, and shorten who moves it too far."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from deal_core.adapters import Adapter, LoraFactors
from deal_core.aggregation.norm_bound import change_norms, clip_to
from deal_core.aggregation.robust import RoundStart, Survivors
from deal_core.aggregation.rule import ClientUpdate

LONGEST = 2.0
"""Largest change of a layer, in medians over clients. Skewed honest clients reach 2.6; at 1 the
rule would shorten half of them in every round."""


def direction(updates: Sequence[ClientUpdate], start: RoundStart) -> Survivors:
    """Keep the updates that agree with the round's start, with their weights, no change too long.

    A client is left out when ``<s_i B_i A_i, s B A> < 0`` over all layers: its product points
    away from the one it was sent. The reference is FLTrust's root of trust without a root data
    set: what all clients agreed on in the rounds before, which nobody can sway in this one.
    Among each other skewed clients are no reference: honest ones oppose each other (cosines of
    their changes down to -0.7, the mean over others around 0), while against the start the
    smallest cosine of an honest client was 0.3 (RESULTS, "Misbehaving clients").

    Where the start tells nothing (zero, in the first round of a task; or half of the clients
    turn away from it, so it is the start that was wrong) the last verdict on a client stands.

    Then every layer's change ``s_i B_i A_i - s B A`` is shortened to twice the median of the
    clients that are kept, so whoever stays can do little harm, in any direction.

    It cannot see a reversed update in the first round of the first task, nor one that undoes
    less than what it was sent: those are only kept short. Rules whose start is always zero
    (``flora``) get the bound alone. Weights are the clients' own claims, as beneath. Linear in
    the number of clients, any rank, whatever the order.

    Sources: Cao et al., NDSS 2021, arXiv 2012.13995 (FLTrust: a negative cosine gets trust 0);
    Sun et al. 2019, arXiv 1911.07963 (norm bound); Karimireddy et al., ICML 2021, arXiv
    2012.10333 (who is judged by one round alone can hide in its noise: use history).
    """
    left_out = _turned(updates, start)
    kept = [update for update in updates if update.client not in left_out]
    norms = [change_norms(update.adapter, start.before) for update in kept]
    bounds = {name: LONGEST * statistics.median(each[name] for each in norms) for name in norms[0]}
    clipped = tuple(clip_to(update, start.before, bounds) for update in kept)
    return Survivors(clipped, tuple(sorted(left_out)))


def _turned(updates: Sequence[ClientUpdate], start: RoundStart) -> set[str]:
    """Clients to leave out, always less than half: judged by the start, or else by the past."""
    agreement = {update.client: inner(update.adapter, start.before) for update in updates}
    opposed = {client for client, value in agreement.items() if value < 0}
    if any(agreement.values()) and 2 * len(opposed) < len(updates):
        return opposed
    known = start.distrusted & agreement.keys()
    return set(known) if 2 * len(known) < len(updates) else set()


def inner(one: Adapter, other: Adapter) -> float:
    """Return ``<s_1 B_1 A_1, s_2 B_2 A_2>`` summed over layers: two ``r_1 x r_2`` Grams each."""
    total = sum(_inner(factors, other.layers[name]) for name, factors in one.layers.items())
    return one.scaling * other.scaling * total


def _inner(one: LoraFactors, other: LoraFactors) -> float:
    left, right = one.B.double().T @ other.B.double(), one.A.double() @ other.A.double().T
    return float((left * right).sum())
