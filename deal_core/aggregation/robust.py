"""Protection against bad updates: a robust step before any aggregation rule.

A robust step turns the updates of a round into the ones that the rule beneath gets to see:
coordinate median and trimmed mean make one update of all, multi-Krum
(:mod:`deal_core.aggregation.krum`) and :mod:`deal_core.aggregation.cosine_norm` pick some. All need
every update of the round in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deal_core.aggregation.aggregation_error import ErrorMeter
from deal_core.aggregation.rule import (
    LORA_A,
    LORA_B,
    Aggregate,
    Aggregation,
    AggregationRule,
    ClientUpdate,
    TooFewUpdates,
    check_update,
)
from deal_core.lora.adapter import Adapter, LoraFactors


@dataclass(frozen=True)
class RoundStart:
    """What is known when a round starts.

    Attributes:
        before: the adapter that every client began from.
        trained: factors trained in the round.
        distrusted: clients that were left out when they were last judged.
    """

    before: Adapter
    trained: frozenset[str]
    distrusted: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Survivors:
    """Updates for the rule beneath, and the clients that are left out."""

    updates: tuple[ClientUpdate, ...]
    excluded: tuple[str, ...] = ()


Step = Callable[[Sequence[ClientUpdate], RoundStart], Survivors]
"""From all updates of a round to what the rule sees."""


@dataclass(frozen=True)
class RobustRule:
    """A rule that sees only what a robust step lets through.

    ``Aggregate.error`` keeps its meaning, the distance from the weighted mean of *all* updates
    of the round: 0 when nothing had to be resisted, large when an outlier was.

    Attributes:
        base: the rule beneath.
        step: the robust step.
        any_rank: whether the step can compare adapters of different ranks.
        distrusted: see :class:`RoundStart`.
    """

    base: AggregationRule
    step: Step
    any_rank: bool = False
    distrusted: frozenset[str] = frozenset()

    @property
    def mixed_ranks(self) -> bool:
        """Both the rule beneath and the step must take them."""
        return self.base.mixed_ranks and self.any_rank

    def trained(self, server_round: int) -> frozenset[str]:
        """Return the factors that the rule beneath lets learn."""
        return self.base.trained(server_round)

    def begin(self, before: Adapter, server_round: int) -> Aggregation:
        """Start a round."""
        return _Round(self, before, server_round)


class _Round:
    def __init__(self, rule: RobustRule, before: Adapter, server_round: int) -> None:
        self._rule = rule
        self._start = RoundStart(before, rule.trained(server_round), rule.distrusted)
        self._base = rule.base.begin(before, server_round)
        self._updates: list[ClientUpdate] = []

    def add(self, update: ClientUpdate) -> None:
        check_update(update, self._start.before, self._start.trained, self._rule.mixed_ranks)
        self._updates.append(update)

    def finish(self) -> Aggregate:
        if not self._updates:
            raise ValueError("no client update to aggregate")
        survivors = self._rule.step(self._updates, self._start)
        meter = ErrorMeter(self._start.before.shapes)
        for update in self._updates:
            meter.add(update.adapter, update.weight)
        for update in survivors.updates:
            self._base.add(update)
        result = self._base.finish()
        error = meter.read(result.current, result.residual)
        return replace(
            result,
            error=error.error,
            estimated=error.estimated or result.estimated,
            excluded=survivors.excluded,
        )


def median(updates: Sequence[ClientUpdate], start: RoundStart) -> Survivors:
    """Return one update for all: their coordinate median (mean of the middle two for even K).

    Weights are ignored: a bad client must not buy influence. Withstands fewer than half bad
    clients. Where both factors are trained the median is taken of each factor, and its
    product is the median of nothing: prefer a rule that trains one factor a round.
    Source: Yin et al., ICML 2018, arXiv 1803.01498.
    """
    return _one(updates, start.trained, _middle)


def trimmed_mean(updates: Sequence[ClientUpdate], start: RoundStart, fraction: float) -> Survivors:
    """Return one update for all: the mean of each coordinate without its extremes.

    ``ceil(fraction * K)`` values are cut at each end; 0 is the plain, unweighted mean; towards
    0.5 it is the median. Rounded up, unlike Flower's FedTrimmedAvg, where 20 % of 4 clients cut
    nobody. The notes at :func:`median` hold. Source: Yin et al., ICML 2018, arXiv 1803.01498.

    Raises:
        TooFewUpdates: nothing would be left.
    """
    count = len(updates)
    cut = math.ceil(fraction * count - 1e-9)
    if 2 * cut >= count:
        raise TooFewUpdates(
            f"trimmed mean: cutting {cut} of {count} clients at each end leaves none"
        )
    return _one(
        updates, start.trained, lambda values: values.sort(0).values[cut : count - cut].mean(0)
    )


def _middle(values: Tensor) -> Tensor:
    ordered = values.sort(0).values
    count = ordered.shape[0]
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


def _one(
    updates: Sequence[ClientUpdate],
    trained: frozenset[str],
    location: Callable[[Tensor], Tensor],
) -> Survivors:
    """Return one update: ``location`` over clients of every trained factor."""
    first = updates[0].adapter

    def factor(name: str, key: str) -> Tensor:
        frozen = first.layers[name].A if key == LORA_A else first.layers[name].B
        if key not in trained:
            return frozen
        layers = [update.adapter.layers[name] for update in updates]
        stacked = torch.stack([each.A if key == LORA_A else each.B for each in layers])
        return location(stacked.double()).to(frozen.dtype)

    layers = {
        name: LoraFactors(factor(name, LORA_A), factor(name, LORA_B)) for name in first.layers
    }
    weight = sum(update.weight for update in updates)
    return Survivors((ClientUpdate("all clients", Adapter(layers, first.scaling), weight),))
