"""Who is let into a round: an update is judged beside those of the others, before any is added.

A bound that fits one model and one learning rate fits no other, so the default bounds are relative:
to what the round started from, and to what the others did. Most of them have to be honest.

The robust step, where an experiment asks for one, comes before any aggregation rule: who turns the
model around, or leaps, is left out.
"""

import math
import statistics
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from deal_core.aggregation.rule import (
    Aggregate,
    AggregationFailed,
    ClientUpdate,
    Rule,
    check_update,
)
from deal_core.aggregation.running import ErrorMeter, square_norm
from deal_core.lora.adapter import Adapter, LoraFactors

HELD = 32
"""Updates that wait for each other; later ones are judged as they come."""
AT_ONCE = 2**18
"""Numbers of a factor pair that are computed on together."""
JUDGES = 2
"""Others that a norm is compared with, at least: of two clients nobody can say who is wrong."""
RELATIVE_BOUND = 20.0
"""Largest length of a whole update, in medians of the round's other updates (of three clients or
more); above: quarantined."""
WEIGHT_CAP = 50.0
"""Largest weight of a client in the average, in medians of the round's other weights; what is above
is cut to it."""
LARGEST_CHANGE = 100.0
"""Of an entry in a round. AdamW moves it by about its rate in a step: a thousand steps of 0.1."""
LONGEST = 4.0
"""Largest change, in medians over the clients of the round; honest skewed ones reach 2.6."""


@dataclass(frozen=True)
class Lengths:
    """How far an update is from what its round started from, over all layers together.

    Both count. A mean of factors can be moved by factors whose product is small (``c B`` and
    ``A / c``), a mean of products by small changes of both factors in one direction.
    """

    factors: float
    """``sqrt(sum ||A_i - A||^2 + ||B_i - B||^2)``."""
    product: float
    """``||s_i B_i A_i - s B A||``."""


@dataclass(frozen=True)
class Verdict:
    """What becomes of an update, whose weight is within the cap; ``fault``: why it stays out."""

    update: ClientUpdate
    fault: str = ""
    cut: bool = False
    """The weight was above the cap."""


class Screen:
    """Judges the updates of one round, in which an entry of a factor changes by ``entry`` at most.

    The first 32 are held until the 33rd comes, or the round ends, and each is judged beside all of
    them; each later one beside all that have come until then: memory is bounded. Medians are over
    the *others*: who lies cannot widen his own bound, and less than half of the clients cannot
    narrow that of anybody else to nothing.
    """

    def __init__(self, entry: float = LARGEST_CHANGE) -> None:
        self._entry = entry
        self._held: list[tuple[ClientUpdate, Lengths]] = []
        self._factors, self._product, self._weights = (list[float]() for _ in range(3))  # sorted
        self._waiting = True

    def add(self, update: ClientUpdate, before: Adapter) -> list[Verdict]:
        """Return the updates that can be judged now, this one taken in, in the order they came; it
        fits the round (layers, shapes, scaling), and is a client's only one.

        Raises:
            AggregationFailed: an entry moved too far, or to nowhere. Nothing is kept.
        """
        lengths = measured(update.adapter, before, self._entry)
        insort(self._factors, lengths.factors)
        insort(self._product, lengths.product)
        insort(self._weights, update.weight)
        self._held.append((update, lengths))
        return [] if self._waiting and len(self._held) <= HELD else self.judged()

    def judged(self) -> list[Verdict]:
        """Judge all that wait; whoever comes later is judged at once."""
        held, self._held, self._waiting = self._held, [], False
        others, verdicts = len(self._weights) - 1, list[Verdict]()
        for update, own in held:
            fault, most = "", math.inf
            if others >= JUDGES:
                fault = self._too_long("factors", own.factors, self._factors)
                fault = fault or self._too_long("product", own.product, self._product)
            if others and not fault:
                most = WEIGHT_CAP * median_without(self._weights, update.weight)
            cut = update.weight > most
            verdicts.append(Verdict(replace(update, weight=min(update.weight, most)), fault, cut))
        return verdicts

    def _too_long(self, what: str, own: float, known: Sequence[float]) -> str:
        """Where most others did nothing at all there is nothing to compare with."""
        bound, middle = RELATIVE_BOUND, median_without(known, own)
        if own <= bound * middle or middle == 0:
            return ""
        return (
            f"the update ({what}) is {own / middle:.3g} times as long as the median of the others, "
            f"more than {bound:g}"
        )


def median_without(known: Sequence[float], value: float) -> float:
    """Return the median of all others than ``value`` among sorted numbers: it is one of them, and
    not alone."""
    left_out, last = bisect_left(known, value), len(known) - 2
    low, high = (known[k + (k >= left_out)] for k in (last // 2, (last + 1) // 2))
    return (low + high) / 2


def measured(adapter: Adapter, before: Adapter, entry: float) -> Lengths:
    """Return the lengths of the change from ``before``, of the same shapes and scaling.

    ``s (B_i A_i - B A) = s [dB, B] [A_i; dA]``: its norm follows, without the difference of two
    long products, from the Gram matrices of the two stacks. Layers of one shape go together.

    Raises:
        AggregationFailed: an entry of a factor changed by more than ``entry``, or is not finite.
    """
    factors = product = 0.0
    for names in _alike(before):
        new, old = [adapter.layers[n] for n in names], [before.layers[n] for n in names]
        new_a, old_b = torch.stack([f.A for f in new]), torch.stack([f.B for f in old])
        moved_a = new_a - torch.stack([f.A for f in old])
        moved_b = torch.stack([f.B for f in new]) - old_b
        for moved in (moved_a, moved_b):
            beyond = ~(moved.abs().amax(dim=(1, 2)) <= entry)  # where it is NaN as well
            if beyond.any():
                name = names[int(beyond.int().argmax())]
                raise AggregationFailed(f"{name}: an entry changed by more than {entry:g}")
            factors += float(torch.linalg.vector_norm(moved, dtype=torch.float64)) ** 2
        left, right = torch.cat([moved_b, old_b], dim=2), torch.cat([new_a, moved_a], dim=1)
        of_left, of_right = left.mT @ left, right @ right.mT
        product += float((of_left.double() * of_right.double()).sum())
    return Lengths(math.sqrt(factors), adapter.scaling * math.sqrt(max(0.0, product)))


def _alike(adapter: Adapter) -> Iterator[list[str]]:
    """Yield names of layers that can be computed on at once: of one shape, and not too many."""
    groups: dict[tuple[int, int], list[str]] = {}
    for name, shape in adapter.shapes.items():
        groups.setdefault(shape, []).append(name)
    for (d_out, d_in), names in groups.items():
        together = max(1, AT_ONCE // (adapter.rank * (d_out + d_in)))
        for start in range(0, len(names), together):
            yield names[start : start + together]


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
    lengths = {update.client: change_norm(update.adapter, before) for update in updates}
    bound = LONGEST * statistics.median(lengths.values())
    if bound == 0:  # most have not moved, as where a task has one label: no measure
        return frozenset(turned)
    return frozenset(turned | {client for client, length in lengths.items() if length > bound})


def change_norm(adapter: Adapter, before: Adapter) -> float:
    """Return ``||s_i B_i A_i - s B A||_F`` over all layers, computed on factors of any rank."""
    changes = (_change(adapter, before, name) for name in before.layers)
    return math.hypot(*(math.sqrt(square_norm(change)) for change in changes))


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
