"""A mechanism with canaries among its records, and what an attacker sees of them.

The canaries are further records of the site: the mechanism plans for them, samples, clips, sums
and noises them with the others, and the ledger charges what it charges for any record. Where the
mechanism protects groups, a canary is a group of some records, which all pull the same way.

Of steps at the site the attacker sees every noised gradient: the proof counts them as released. Of
noise in a sum over sites it is the server with as many other sites as the noise is planned against:
what these send it knows, and takes away. As many others as may fail have failed. So it sees the sum
over the sites that are counted on, which make up the whole noise and no more.

Only a simulation plants canaries: an audit builds its clients itself, and a server cannot ask for
it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deal_core.config.experiment import Experiment
from deal_core.lora.attach import ExampleLosses, learning_factors
from deal_core.lora.payload import PREFIX
from deal_core.models.interface import Encoded
from deal_core.privacy.distributed_noise import NoisySum, grid_step
from deal_core.privacy.dpsgd import PrivateGradients
from deal_core.privacy.events import GROUP
from deal_core.privacy.interface import (
    LocalUpdate,
    Mechanism,
    RecordId,
    Site,
    Train,
    UpdateRequest,
)
from deal_core.protection import shares_of
from simulations.audit.canaries import GradientCanaries, PlantedObjective, Scores

FAR = 100.0
"""Length of a canary's gradient in units of the bound: without clipping it could not be missed."""
GROUP_RECORDS = 3
"""Records of a canary that is a group: clipped one by one, they would count as so many."""

Total = Mapping[str, NDArray[Any]]
Place = tuple[str, str, int, int]
"""Task, phase, stage and round of a sum."""


@dataclass(frozen=True)
class Overseen:
    """A mechanism of which an audit changes what it is asked, and the trainings under it."""

    inner: Mechanism
    """Does all else."""
    around: Callable[[UpdateRequest, Train], Train]
    """Returns the training that is done for a request in the place of the client's."""
    asked: Callable[[UpdateRequest], UpdateRequest] = lambda ask: ask
    """Returns the request that the mechanism beneath gets."""

    @property
    def unit(self) -> str | None:
        """What the mechanism beneath protects."""
        return self.inner.unit

    def trained(self, factors: frozenset[str]) -> frozenset[str]:
        """Return what the mechanism beneath lets learn."""
        return self.inner.trained(factors)

    def update(self, ask: UpdateRequest, site: Site, train: Train) -> LocalUpdate:
        """Return the update of the mechanism beneath."""
        return self.inner.update(self.asked(ask), site, self.around(ask, train))


@dataclass
class Seen:
    """Adds up what an attacker sees of the canaries, over all steps, rounds and tasks.

    Attributes:
        canaries: whose directions are looked along.
        counted: sites in the sums that are seen, the attacked one first; none: its steps are seen.
        total: ``(count,)``: the logarithm of how much likelier it is, under the mechanism that was
            planned, that each canary was there; no test is better.
        open: sums that not all sites have given their part of.
        scored: how many were whole.
    """

    canaries: GradientCanaries
    counted: tuple[str, ...] = ()
    total: Scores = field(init=False)
    open: dict[Place, dict[str, tuple[Total, NoisySum]]] = field(default_factory=dict)
    scored: int = 0

    def __post_init__(self) -> None:
        self.total = np.zeros(self.canaries.count)

    def add(self, released: Mapping[str, Tensor], unit: float, rate: float, noise: float) -> None:
        """Add one noised sum: ``released`` times ``unit`` is in clipping bounds."""
        self.total += likelihood_ratio(self.canaries.scores(released) * unit, rate, noise)

    def take(self, client: str, place: Place, part: Total, sum_of: NoisySum) -> None:
        """Take a site's part of a sum, and score the sum when it is whole, as the attacked site
        plans it."""
        if client not in self.counted:
            return
        parts = self.open.setdefault(place, {})
        parts[client] = part, sum_of
        if len(parts) == len(self.counted):
            self.scored += 1
            del self.open[place]
            whole, (_, plan) = _added([own for own, _ in parts.values()]), parts[self.counted[0]]
            self.add(whole, grid_step(1.0), plan.sample_rate, plan.noise_multiplier)


def likelihood_ratio(along: Scores, sample_rate: float, noise_multiplier: float) -> Scores:
    """Return ``log(1 - q + q exp((x - 1/2) / sigma^2))``: of a step of DP-SGD with a canary that is
    sampled with probability q and has norm 1, against one without; ``x`` is the noised sum along
    it, in units of the bound."""
    out = math.log1p(-sample_rate) if sample_rate < 1 else -math.inf
    there = math.log(sample_rate) + (along - 0.5) / noise_multiplier**2
    ratio: Scores = np.logaddexp(out, there)
    return ratio


def _added(parts: Sequence[Total]) -> Mapping[str, Tensor]:
    """The sum over sites, by the names of factors."""
    return {
        key.removeprefix(PREFIX).removesuffix(".weight"): torch.from_numpy(
            np.sum([part[key] for part in parts], axis=0, dtype=np.float64)
        )
        for key in parts[0]
    }


@dataclass(frozen=True)
class PlantedSteps:
    """The noised gradients of DP-SGD with canaries, and the attacker, who sees each of them."""

    inner: PrivateGradients
    """The mechanism's, of records and canaries."""
    records: int
    """Positions below are records, those from there on canaries."""
    each: int
    """Positions that a canary has."""
    seen: Seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @property
    def data(self) -> Sequence[Encoded]:
        """The records: canaries are no texts."""
        return self.inner.data[: self.records]

    def accumulate(
        self, module: nn.Module, objective: ExampleLosses, batch: Sequence[int]
    ) -> float:
        """Add the gradient of records and canaries, and show it to the attacker."""
        own, length = self.inner, FAR * self.inner.max_grad_norm
        both = PlantedObjective(
            objective, module, self.records, self.seen.canaries, length, self.each
        )
        loss = own.accumulate(module, both, batch)
        factors = learning_factors(module)
        released = {name: f.grad for name, f in factors.items() if f.grad is not None}
        unit = own.expected_batch / own.max_grad_norm
        self.seen.add(released, unit, own.sample_rate, own.noise_multiplier)
        return loss


@dataclass(kw_only=True)
class PlantedSum(NoisySum):
    """One noisy sum of a site, over its records, with the attacker, who sees it among the others:
    ``inner`` is the mechanism's, of records and canaries, of which each has so many positions."""

    inner: NoisySum
    each: int
    seen: Seen
    client: str
    place: Place

    def total(self, module: nn.Module, objective: ExampleLosses) -> dict[str, NDArray[np.int64]]:
        """Return the sum of records and canaries, and show it to the attacker."""
        if self.client == self.seen.counted[0]:
            length, canaries = FAR * self.max_grad_norm, self.seen.canaries
            objective = PlantedObjective(
                objective, module, len(self.data), canaries, length, self.each
            )
        total = self.inner.total(module, objective)
        self.seen.take(self.client, self.place, total, self.inner)
        return total


def with_canaries(ask: UpdateRequest, count: int, each: int) -> UpdateRequest:
    """Return the request of a site with so many canaries for further records; each is so many
    records, more than one: of one group."""
    first, more = len(ask.data), each * count
    groups = None
    if ask.groups is not None:
        last = len(set(ask.groups))
        groups = [*ask.groups, *(last + k // each for k in range(more))]
    return replace(
        ask,
        data=[*ask.data, *([Encoded((0,), 0)] * more)],
        record_ids=[*ask.record_ids, *(RecordId(ask.task, first + k) for k in range(more))],
        groups=groups,
        site_units=lambda: ask.site_units() + count,
        units=lambda: {task: known + count for task, known in ask.units().items()},
        ids=lambda: [*ask.ids(), *(f"canary {k}" for k in range(count))],
    )


def counted_sites(experiment: Experiment, attacked: int) -> tuple[str, ...]:
    """Return the sites whose noise hides the attacked one's records: itself, first, and as many
    others as its plan counts on."""
    others = [k for k in range(experiment.federation.clients) if k != attacked]
    return tuple(str(k) for k in (attacked, *others[: shares_of(experiment) - 1]))


def plant(
    inner: Mechanism, canaries: GradientCanaries, counted: tuple[str, ...] = ()
) -> tuple[Mechanism, Seen]:
    """Return a mechanism with canaries planted in it, and the attacker (:class:`Seen`); each canary
    is one of the units that the mechanism protects. Where sums over ``counted`` sites are seen they
    are at the first of these, of all that share the mechanism."""
    seen, each = Seen(canaries, counted), GROUP_RECORDS if inner.unit == GROUP else 1

    def asked(ask: UpdateRequest) -> UpdateRequest:
        attacked = not counted or ask.client == counted[0]
        return with_canaries(ask, canaries.count, each) if attacked else ask

    def around(ask: UpdateRequest, train: Train) -> Train:
        def trained(given: PrivateGradients | NoisySum) -> LocalUpdate:
            records = len(ask.data)
            if len(given.data) < records:  # a training has failed, and noise alone leaves
                return train(given)
            if isinstance(given, PrivateGradients):
                return train(PlantedSteps(given, records, each, seen))
            own = {each.name: getattr(given, each.name) for each in fields(given)}
            place = ask.task, ask.phase, ask.stage, ask.server_round
            own |= {"data": given.data[:records], "inner": given, "place": place}
            return train(PlantedSum(**own, each=each, seen=seen, client=ask.client))

        return trained

    return Overseen(inner, around, asked), seen
