"""A mechanism with canaries among its records, and what an attacker sees of them.

The canaries are further records of the site: the mechanism plans for them, samples, clips, sums
and noises them with the others, and the ledger charges what it charges for any record. Where the
mechanism protects groups, a canary is a group of some records, which all pull the same way. Nothing
of it can be asked for by a server: an audit builds its clients itself, and only in a simulation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from deal_core.lora.attach import learning_factors
from deal_core.lora.per_example import ExampleLosses
from deal_core.models.interface import Encoded, LanguageModel
from deal_core.privacy.audit.audited import Overseen, watched
from deal_core.privacy.audit.canaries import GradientCanaries
from deal_core.privacy.audit.planted_objective import PlantedObjective
from deal_core.privacy.dpsgd import PrivateGradients
from deal_core.privacy.events import GROUP
from deal_core.privacy.interface import (
    Gradients,
    Grouping,
    Mechanism,
    Permit,
    Probes,
    RecordId,
    UpdateRequest,
)

Attacked = Literal["updates", "steps"]
FAR = 100.0
"""Length of a canary's gradient in units of the bound: without clipping it could not be missed."""
GROUP_RECORDS = 3
"""Records of a canary that is a group: clipped one by one, they would count as so many."""
SHORT = 16
"""Tokens that a canary counts for, so that a pass does not hold too many."""

Scores = NDArray[np.float64]


class Seen(Protocol):
    """Adds up what an attacker sees of the canaries, over all steps, rounds and tasks: ``total``,
    ``(count,)``."""

    total: Scores

    def gradient(self, gradients: Gradients, factors: Mapping[str, Tensor]) -> None:
        """A step's gradient as the optimiser gets it: the proof counts it as released."""

    def update(self, change: Mapping[str, Tensor]) -> None:
        """One local training has changed what it trained by so much."""


@dataclass
class NoisedSteps:
    """Sees every noised gradient, which the proof of DP-SGD counts as released.

    Attributes:
        canaries: whose directions are looked along.
        total: ``(count,)``: the logarithm of how much likelier it is, under the mechanism that was
            planned, that the canary was there; no test is better.
    """

    canaries: GradientCanaries
    total: Scores

    def gradient(self, gradients: Gradients, factors: Mapping[str, Tensor]) -> None:
        """Add one step."""
        assert isinstance(gradients, PrivateGradients)
        along = self.canaries.scores(factors) * gradients.expected_batch / gradients.max_grad_norm
        self.total += likelihood_ratio(along, gradients.sample_rate, gradients.noise_multiplier)

    def update(self, change: Mapping[str, Tensor]) -> None:
        """It follows from the gradients."""


@dataclass
class Updates:
    """Sees what leaves a site that has no mechanism.

    Attributes:
        canaries: whose directions are looked along.
        total: ``(count,)``: how far updates went against them, as steps do.
    """

    canaries: GradientCanaries
    total: Scores

    def gradient(self, gradients: Gradients, factors: Mapping[str, Tensor]) -> None:
        """It does not leave."""

    def update(self, change: Mapping[str, Tensor]) -> None:
        """Add one update."""
        self.total -= self.canaries.scores(change)


def likelihood_ratio(along: Scores, sample_rate: float, noise_multiplier: float) -> Scores:
    """Return ``log(1 - q + q exp((x - 1/2) / sigma^2))``: of a step of DP-SGD with a canary that is
    sampled with probability q and has norm 1, against one without; ``x`` is the noised sum along
    it, in units of the bound."""
    out = math.log1p(-sample_rate) if sample_rate < 1 else -math.inf
    there = math.log(sample_rate) + (along - 0.5) / noise_multiplier**2
    ratio: Scores = np.logaddexp(out, there)
    return ratio


@dataclass
class Watched:
    """Gradients of records and canaries, with somebody who sees what comes out.

    Attributes:
        inner: the mechanism's.
        records: positions below are records, those from there on canaries.
        length: of a canary's gradient.
        records_each: positions that a canary has.
    """

    inner: Gradients
    records: int
    canaries: GradientCanaries
    length: float
    seen: Seen
    records_each: int = 1
    _before: dict[str, Tensor] = field(default_factory=dict)

    @property
    def data(self) -> Sequence[Encoded]:
        """The records: canaries are no texts."""
        return self.inner.data[: self.records]

    def rehearse(self, module: nn.Module, objective: ExampleLosses, probes: int) -> None:
        """Let the mechanism's own gradients try the objective out, without canaries."""
        self.inner.rehearse(module, objective, probes)

    def batches(self) -> Iterable[Sequence[int]]:
        """Return the batches of the mechanism's own gradients, canaries among the positions."""
        return self.inner.batches()

    def accumulate(
        self, module: nn.Module, objective: ExampleLosses, batch: Sequence[int]
    ) -> float:
        """Add the gradient of records and canaries, and show it to the attacker."""
        if not self._before:
            self._before = _values(module)
        planted = PlantedObjective(
            objective, module, self.records, self.canaries, self.length, self.records_each
        )
        loss = self.inner.accumulate(module, planted, batch)
        factors = learning_factors(module)
        there = {name: f.grad for name, f in factors.items() if f.grad is not None}
        if len(there) == len(factors):
            self.seen.gradient(self.inner, there)
        return loss

    def stepped(self, module: nn.Module) -> None:
        """Tell the mechanism's own gradients that the optimiser has moved."""
        self.inner.stepped(module)

    def finished(self, model: LanguageModel, labels: Sequence[str], probes: Probes) -> None:
        """End the mechanism's own gradients; then show what will be released to the attacker."""
        self.inner.finished(model, labels, probes)
        if self._before:
            after = _values(model.module)
            self.seen.update({name: after[name] - self._before[name] for name in after})


def _values(module: nn.Module) -> dict[str, Tensor]:
    return {name: f.detach().cpu().clone() for name, f in learning_factors(module).items()}


def with_canaries(ask: UpdateRequest, count: int, each: int) -> UpdateRequest:
    """Return the request with canaries for further records of the site.

    Args:
        ask: the site's own.
        count: number of canaries.
        each: records that a canary is; more than one: of one group.
    """
    first, more = len(ask.data), each * count
    tokens = (ask.data[0].tokens if ask.data else (0,) * SHORT)[:SHORT]
    return replace(
        ask,
        data=[*ask.data, *([Encoded(tokens, 0)] * more)],
        record_ids=[*ask.record_ids, *(RecordId(ask.task, first + k) for k in range(more))],
        site_records=lambda: ask.site_records() + more,
        records=lambda: {task: known + more for task, known in ask.records().items()},
        ids=lambda: [*ask.ids(), *(f"canary {k // each}" for k in range(more))],
        grouping=None if ask.grouping is None else _with_groups(ask.grouping, count, each),
    )


def _with_groups(own: Grouping, count: int, each: int) -> Grouping:
    """Return the groups of the site, and after them a group for every canary."""
    first = len(set(own.numbers))
    more = [first + k for k in range(count) for _ in range(each)]
    return Grouping(
        numbers=[*own.numbers, *more],
        groups=lambda: {task: known + count for task, known in own.groups().items()},
        site_groups=lambda: own.site_groups() + count,
    )


SEEN: Mapping[Attacked, Callable[[GradientCanaries, Scores], Seen]] = {
    "updates": Updates,
    "steps": NoisedSteps,
}
"""What canaries are planted in, to what is looked at."""


def plant(
    attacked: Attacked,
    inner: Mechanism,
    canaries: GradientCanaries,
    bound: float,
    group_records: int = GROUP_RECORDS,
) -> tuple[Overseen, Seen]:
    """Return a mechanism with canaries planted in it, and who looks; each canary is one of the
    units that the mechanism protects.

    Args:
        attacked: what of the mechanism is.
        inner: the mechanism itself.
        canaries: their directions, and which of them are there.
        bound: of a record's gradient.
        group_records: records of each canary, where the mechanism protects groups.
    """
    seen = SEEN[attacked](canaries, np.zeros(canaries.count))
    each = records_of_each(inner, group_records)

    def granted(ask: UpdateRequest, permit: Permit) -> Permit:
        return watched(
            permit,
            lambda own: Watched(own, len(ask.data), canaries, FAR * bound, seen, each),
        )

    asked = partial(with_canaries, count=canaries.count, each=each)
    return Overseen(inner, granted, asked), seen


def records_of_each(inner: Mechanism, group_records: int = GROUP_RECORDS) -> int:
    """Return how many records a canary is, which is one of the units that a mechanism protects."""
    return group_records if inner.unit == GROUP else 1
