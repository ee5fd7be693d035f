"""A mechanism with canaries among its records, and what an attacker sees of them.

The canaries are further records of the site: the mechanism plans for them, samples, clips, sums
and noises them with the others, and the ledger charges what it charges for any record. Where the
mechanism protects groups, a canary is a group of some records, which all pull the same way. The
loss of a canary is linear in its own copies of the factors (see
:mod:`deal_core.lora.per_example`): its gradient is its direction, far longer than any bound. It
arises in the same backward pass as those of the records, and is clipped, or is not, with them.

Only a simulation plants canaries: an audit builds its clients itself, and a server cannot ask for
it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from deal_core.lora.attach import learning_factors, lora_layers
from deal_core.lora.per_example import ExampleLosses
from deal_core.models.interface import Encoded, LanguageModel
from deal_core.privacy.audit.canaries import ENTRY, GradientCanaries, Scores
from deal_core.privacy.events import GROUP
from deal_core.privacy.interface import (
    Gradients,
    GradientSum,
    Grouping,
    LocalUpdate,
    Mechanism,
    Permit,
    Probes,
    RecordId,
    Site,
    UpdateRequest,
)

FAR = 100.0
"""Length of a canary's gradient in units of the bound: without clipping it could not be missed."""
GROUP_RECORDS = 3
"""Records of a canary that is a group: clipped one by one, they would count as so many."""
SHORT = 16
"""Tokens that a canary counts for, so that a pass does not hold too many."""

Given = Gradients | GradientSum


@dataclass(frozen=True)
class Overseen:
    """A mechanism whose leave to read records an audit changes.

    Attributes:
        inner: the mechanism beneath, which does all else.
        change: returns the gradients that a request gets, given those of the mechanism.
        asked: returns the request that the mechanism beneath gets.
    """

    inner: Mechanism
    change: Callable[[UpdateRequest, Any], Any]
    asked: Callable[[UpdateRequest], UpdateRequest] = lambda ask: ask

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def permit(self, ask: UpdateRequest, site: Site) -> Permit | LocalUpdate:
        """Return the leave of the mechanism beneath with other gradients, or the update that the
        same request was answered with.

        Raises:
            Refusal: the mechanism takes no part.
        """
        permit = self.inner.permit(self.asked(ask), site)
        if isinstance(permit, LocalUpdate):
            return permit
        # what leaves of a training that has failed is noise alone, and is not looked at
        return replace(permit, gradients=self.change(ask, permit.gradients))


def overseen(
    inner: Mechanism,
    change: Callable[[UpdateRequest, Any], Any],
    asked: Callable[[UpdateRequest], UpdateRequest] = lambda ask: ask,
) -> Mechanism:
    """Return a mechanism with other gradients; see :class:`Overseen`."""
    return cast(Mechanism, Overseen(inner, change, asked))


@dataclass(frozen=True)
class Witnessed:
    """Gradients as they are, with a witness of the model that the site hands over.

    Attributes:
        inner: the mechanism's.
        look: is shown the model and the labels at the end; may score, must not change it.
    """

    inner: Gradients
    look: Callable[[LanguageModel, Sequence[str]], None]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def finished(self, model: LanguageModel, labels: Sequence[str], probes: Probes) -> None:
        """End the mechanism's own gradients; then show the witness what will be released."""
        self.inner.finished(model, labels, probes)
        self.look(model, labels)


@dataclass
class Seen:
    """Adds up what an attacker sees of the canaries, over all steps, rounds and tasks.

    Attributes:
        canaries: whose directions are looked along.
        total: ``(count,)``: the logarithm of how much likelier it is, under the mechanism that was
            planned, that each canary was there; no test is better.
    """

    canaries: GradientCanaries
    total: Scores

    @classmethod
    def of(cls, canaries: GradientCanaries) -> Seen:
        """Return one that has seen nothing yet."""
        return cls(canaries, np.zeros(canaries.count))

    def add(self, released: Mapping[str, Tensor], unit: float, rate: float, noise: float) -> None:
        """Add one noised sum: ``released`` times ``unit`` is in clipping bounds."""
        self.total += likelihood_ratio(self.canaries.scores(released) * unit, rate, noise)


def likelihood_ratio(along: Scores, sample_rate: float, noise_multiplier: float) -> Scores:
    """Return ``log(1 - q + q exp((x - 1/2) / sigma^2))``: of a step of DP-SGD with a canary that is
    sampled with probability q and has norm 1, against one without; ``x`` is the noised sum along
    it, in units of the bound."""
    out = math.log1p(-sample_rate) if sample_rate < 1 else -math.inf
    there = math.log(sample_rate) + (along - 0.5) / noise_multiplier**2
    ratio: Scores = np.logaddexp(out, there)
    return ratio


@dataclass(frozen=True)
class PlantedSteps:
    """The noised gradients of DP-SGD with canaries, and the attacker, who sees every one of them:
    the proof counts them as released.

    Attributes:
        inner: the mechanism's, of records and canaries.
        records: positions below are records, those from there on canaries.
        each: positions that a canary has.
        seen: the attacker, with the canaries.
    """

    inner: Any
    records: int
    each: int
    seen: Seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @property
    def data(self) -> Sequence[Encoded]:
        """The records: canaries are no texts."""
        own: Sequence[Encoded] = self.inner.data[: self.records]
        return own

    def accumulate(
        self, module: nn.Module, objective: ExampleLosses, batch: Sequence[int]
    ) -> float:
        """Add the gradient of records and canaries, and show it to the attacker."""
        own = self.inner
        length = FAR * own.max_grad_norm
        both = PlantedObjective(
            objective, module, self.records, self.seen.canaries, length, self.each
        )
        loss: float = own.accumulate(module, both, batch)
        factors = learning_factors(module)
        released = {name: f.grad for name, f in factors.items() if f.grad is not None}
        unit = own.expected_batch / own.max_grad_norm
        self.seen.add(released, unit, own.sample_rate, own.noise_multiplier)
        return loss


def plant(inner: Mechanism, canaries: GradientCanaries) -> tuple[Mechanism, Seen]:
    """Return a mechanism of noised steps with canaries planted in it, and the attacker; each canary
    is one of the units that the mechanism protects."""
    seen, each = Seen.of(canaries), records_of_each(inner)

    def change(ask: UpdateRequest, given: Gradients) -> PlantedSteps:
        return PlantedSteps(given, len(ask.data), each, seen)

    return overseen(inner, change, partial(with_canaries, count=canaries.count, each=each)), seen


def records_of_each(inner: Mechanism) -> int:
    """Return how many records a canary is, which is one of the units that a mechanism protects."""
    return GROUP_RECORDS if inner.unit == GROUP else 1


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


@dataclass(frozen=True)
class PlantedObjective:
    """Attributes: ``inner``, of records; ``module``, whose factors learn; ``records``, how many:
    the canaries' positions follow, ``each`` for every canary; ``length``, of the gradient of each.
    A canary whose coin says that it is not there has no gradient."""

    inner: ExampleLosses
    module: nn.Module
    records: int
    canaries: GradientCanaries
    length: float
    each: int = 1

    def example_losses(self, batch: Sequence[int]) -> Tensor:
        """Return losses of records and canaries, ``(batch,)``, in their order."""
        rows = [row for row, position in enumerate(batch) if position < self.records]
        planted = [row for row, position in enumerate(batch) if position >= self.records]
        losses = torch.zeros(len(batch), device=next(self.module.parameters()).device)
        if rows:
            with _copies_of(self.module, rows):
                own = self.inner.example_losses([batch[row] for row in rows])
            losses = losses.index_add(0, _index(rows, losses), own.to(losses.dtype))
        if planted:
            places = np.array([batch[row] for row in planted])
            numbers = (places - self.records) // self.each
            losses = losses + self._linear(numbers, np.array(planted), len(batch))
        return losses

    def _linear(self, numbers: np.ndarray, rows: np.ndarray, size: int) -> Tensor:
        factors = learning_factors(self.module)
        entries = self.canaries.entries(factors)
        weights = self.length * ENTRY * entries.signs[numbers] * self.canaries.included[numbers]
        places = entries.places[numbers].T.ravel()
        both = np.concatenate([rows, rows]), np.concatenate([weights, -weights])
        values: list[Tensor] = []
        begin = 0
        for name in sorted(factors):
            width = factors[name].numel()
            here = (begin <= places) & (places < begin + width)
            i, j = np.unravel_index(places[here] - begin, factors[name].shape)
            copy = _as_used(self.module, name)
            row, weight = (_index(part[here], copy) for part in both)
            own = copy[row, _index(i, copy), _index(j, copy)]
            values.append(torch.zeros(size, device=copy.device).index_add(0, row, weight * own))
            begin += width
        return torch.stack(values).sum(dim=0)


def _index(values: Sequence[int] | np.ndarray, like: Tensor) -> Tensor:
    return torch.as_tensor(values, device=like.device)


def _as_used(module: nn.Module, name: str) -> Tensor:
    """Return a factor as the layer works with it: a copy for every example, ``(batch, ...)``."""
    layer_name, _, factor = name.rpartition(".")
    layer = lora_layers(module)[layer_name]
    copies: tuple[Tensor, Tensor] = layer.copies
    return copies[0] if factor == "lora_A" else copies[1]


@contextmanager
def _copies_of(module: nn.Module, rows: Sequence[int]) -> Iterator[None]:
    """Within the block layers work with the copies of these examples of the pass alone."""
    layers = [layer for layer in lora_layers(module).values() if getattr(layer, "copies", None)]
    before = [layer.copies for layer in layers]
    for layer, both in zip(layers, before, strict=True):
        layer.copies = tuple(
            copy[_index(rows, copy)] if copy.requires_grad else copy[: len(rows)] for copy in both
        )
    try:
        yield
    finally:
        for layer, both in zip(layers, before, strict=True):
            layer.copies = both
