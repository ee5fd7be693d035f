"""Canaries: made-up records that a mechanism must hide as any real one, and what an attacker sees
of them.

A canary's gradient has two entries of equal size and opposite sign. No two canaries share an
entry, so each is seen without the others, and thousands cost little. The two entries lie at the
same place in two layers of the same shape, wherever there are two: noise that such layers share
would cancel, and the canary would stand there bare.

The canaries are further records of the site: the mechanism plans for them, samples, clips, sums
and noises them with the others, and the ledger charges what it charges for any record. Where the
mechanism protects groups, a canary is a group of some records, which all pull the same way.

Of steps at the site the attacker sees every noised gradient: the proof counts them as released. Of
noise in a sum over sites it is the server with as many other sites as the noise is planned against:
what these send it knows, and takes away. As many others as may fail have failed. So it sees the sum
over the sites that are counted on, which make up the whole noise and no more.

Only a simulation plants canaries: an audit builds its clients itself, and a server cannot ask for
it.

Source: Steinke, Nasr & Jagielski, NeurIPS 2023, section 5.1 (canaries in gradient space); Nasr et
al., USENIX Security 2023 (one entry each).
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from deal_core.lora.attach import ExampleLosses, learning_factors
from deal_core.lora.payload import PREFIX
from deal_core.models.interface import Encoded
from deal_core.privacy.distributed_noise import NoisySum, grid_step
from deal_core.privacy.dpsgd import PrivateGradients, Sampled
from deal_core.privacy.events import GROUP
from deal_core.privacy.interface import LocalUpdate, Mechanism, RecordId, Site, Train, UpdateRequest
from deal_core.protection import shares_of
from deal_core.randomness import seeded

ENTRY = 1 / math.sqrt(2)
"""Size of each of a direction's two entries."""
FAR = 100.0
"""Length of a canary's gradient in units of the bound: without clipping it could not be missed."""
GROUP_RECORDS = 3
"""Records of a canary that is a group: clipped one by one, they would count as so many."""

Shapes = tuple[tuple[str, tuple[int, ...]], ...]
"""Name and shape of every factor, by name."""
Scores = NDArray[np.float64]
Total = Mapping[str, NDArray[Any]]
Place = tuple[str, str, int, int]
"""Task, phase, stage and round of a sum."""


@dataclass(frozen=True)
class Entries:
    """Where directions of norm 1 are not zero."""

    names: tuple[str, ...]
    """Of all factors, sorted; they are laid end to end."""
    starts: tuple[int, ...]
    """Place of the first entry of each."""
    places: NDArray[np.int64]
    """``(count, 2)``."""
    signs: NDArray[np.float32]
    """``(count,)``, of the first entry; the second has the other."""


@dataclass(frozen=True)
class GradientCanaries:
    """``count`` directions with their coins; all from ``seed``, which whoever attacks knows (but
    for the coins). ``repeat`` makes others from the same seed."""

    count: int
    seed: int
    repeat: int = 0

    @cached_property
    def included(self) -> NDArray[np.bool_]:
        """``(count,)``: which take part, each by a fair coin of its own."""
        generator = seeded("coins", self.seed, self.repeat)
        return torch.rand(self.count, generator=generator, dtype=torch.float64).numpy() < 0.5

    def entries(self, like: Mapping[str, Tensor]) -> Entries:
        """Return the directions over all factors in ``like`` together; equal for equal names and
        shapes.

        Raises:
            UserError: there are more canaries than pairs of entries.
        """
        return _entries(self, tuple((name, tuple(like[name].shape)) for name in sorted(like)))

    def scores(self, like: Mapping[str, Tensor]) -> Scores:
        """Return ``(count,)``: how far what is given goes along every direction."""
        entries = self.entries(like)
        flat = np.concatenate([like[name].detach().cpu().numpy().ravel() for name in sorted(like)])
        pairs = flat[entries.places].astype(np.float64)
        scores: Scores = ENTRY * entries.signs * (pairs[:, 0] - pairs[:, 1])
        return scores


@lru_cache(maxsize=8)
def _entries(canaries: GradientCanaries, shapes: Shapes) -> Entries:
    names, sizes = zip(*((name, math.prod(shape)) for name, shape in shapes), strict=True)
    starts = (0, *accumulate(sizes[:-1]))
    pairs, count = _pairs(shapes, starts), canaries.count
    if count > len(pairs):
        raise UserError(
            f"--canaries {count}: what is trained has room for {len(pairs)} gradient canaries that "
            "share no entry; take so many, or train more (adapter.rank, adapter.target_modules)"
        )
    generator = seeded(canaries.seed, "canaries", canaries.repeat)
    chosen = torch.randperm(len(pairs), generator=generator)[:count].numpy()
    signs = torch.randint(2, (count,), generator=generator).numpy() * 2 - 1
    return Entries(names, starts, pairs[chosen], signs.astype(np.float32))


def _pairs(shapes: Shapes, starts: Sequence[int]) -> NDArray[np.int64]:
    """Return ``(pairs, 2)``: every entry in one pair at most; layer beside layer of the same shape,
    and the last of an odd number with itself."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for (_, shape), start in zip(shapes, starts, strict=True):
        alike.setdefault(shape, []).append(start)
    pairs: list[NDArray[np.int64]] = []
    for shape, places in alike.items():
        inside = np.arange(math.prod(shape))
        for left, right in zip(places[::2], places[1::2], strict=False):
            pairs.append(np.stack([left + inside, right + inside], axis=1))
        if len(places) % 2:
            half = len(inside) // 2
            pairs.append(places[-1] + inside[: 2 * half].reshape(2, half).T)
    return np.concatenate(pairs)


@dataclass(frozen=True)
class PlantedObjective:
    """Losses of records and, at the positions behind them, of canaries, whose gradient is far
    longer than any bound, or, where the coin says that a canary is away, zero.

    The loss of a canary is linear in the factors, so that its gradient is clipped, or is not, as
    any."""

    inner: ExampleLosses
    """Of records."""
    module: nn.Module
    records: int
    """How many there are."""
    canaries: GradientCanaries
    length: float
    """Of the gradient of each canary."""
    each: int = 1
    """Positions that a canary has."""

    def example_losses(self, batch: Sequence[int]) -> Tensor:
        """Return losses, ``(batch,)``: of records, or of one canary."""
        if all(position < self.records for position in batch):
            return self.inner.example_losses(batch)
        [position] = batch  # every gradient is computed by itself
        number = (position - self.records) // self.each
        factors = learning_factors(self.module)
        entries = self.canaries.entries(factors)

        def entry(place: int) -> Tensor:
            factor = bisect_right(entries.starts, place) - 1
            return factors[entries.names[factor]].flatten()[place - entries.starts[factor]]

        first, second = map(entry, entries.places[number].tolist())
        weight = self.length * ENTRY * entries.signs[number] * self.canaries.included[number]
        return float(weight) * (first - second.to(first.device)).reshape(1)


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
    """Adds up what an attacker sees of the canaries, over all steps, rounds and tasks."""

    canaries: GradientCanaries
    counted: tuple[str, ...] = ()
    """Sites in the sums that are seen, the attacked one first; none: its steps are seen."""
    total: Scores = field(init=False)
    """``(count,)``: the logarithm of how much likelier it is, under the mechanism that was planned,
    that each canary was there; no test is better."""
    open: dict[Place, dict[str, tuple[Total, NoisySum]]] = field(default_factory=dict)
    """Sums that not all sites have given their part of."""
    scored: int = 0
    """How many were whole."""

    def __post_init__(self) -> None:
        self.total = np.zeros(self.canaries.count)

    def beside(
        self, records: Sampled, each: int, objective: ExampleLosses, module: nn.Module
    ) -> PlantedObjective:
        """Return the losses of records with those of the canaries, ``each`` at so many positions,
        behind them."""
        count, length = len(records.data), FAR * records.max_grad_norm
        return PlantedObjective(objective, module, count, self.canaries, length, each)

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
            whole = {
                key.removeprefix(PREFIX).removesuffix(".weight"): torch.from_numpy(
                    np.sum([own[key] for own, _ in parts.values()], axis=0, dtype=np.float64)
                )
                for key in part
            }
            _, plan = parts[self.counted[0]]
            self.add(whole, grid_step(1.0), plan.sample_rate, plan.noise_multiplier)


def likelihood_ratio(along: Scores, sample_rate: float, noise_multiplier: float) -> Scores:
    """Return ``log(1 - q + q exp((x - 1/2) / sigma^2))``: of a step of DP-SGD with a canary that is
    sampled with probability q and has norm 1, against one without; ``x`` is the noised sum along
    it, in units of the bound."""
    out = math.log1p(-sample_rate) if sample_rate < 1 else -math.inf
    there = math.log(sample_rate) + (along - 0.5) / noise_multiplier**2
    ratio: Scores = np.logaddexp(out, there)
    return ratio


@dataclass(kw_only=True)
class PlantedSteps(PrivateGradients):
    """The noised gradients of DP-SGD with canaries, and the attacker, who sees each of them.
    ``data`` are the records alone, for canaries are no texts; all else is of both."""

    each: int
    """Positions that a canary has."""
    seen: Seen

    def accumulate(
        self, module: nn.Module, objective: ExampleLosses, batch: Sequence[int]
    ) -> float:
        """Add the gradient of records and canaries, and show it to the attacker."""
        both = self.seen.beside(self, self.each, objective, module)
        loss = super().accumulate(module, both, batch)
        factors = learning_factors(module)
        released = {name: f.grad for name, f in factors.items() if f.grad is not None}
        unit = self.expected_batch / self.max_grad_norm
        self.seen.add(released, unit, self.sample_rate, self.noise_multiplier)
        return loss


@dataclass(kw_only=True)
class PlantedSum(NoisySum):
    """One noisy sum of a site, with canaries as of steps, and the attacker, who sees it among the
    others."""

    each: int
    seen: Seen
    client: str
    place: Place

    def total(self, module: nn.Module, objective: ExampleLosses) -> dict[str, NDArray[np.int64]]:
        """Return the sum of records and canaries, and show it to the attacker."""
        if self.client == self.seen.counted[0]:
            objective = self.seen.beside(self, self.each, objective, module)
        total = super().total(module, objective)
        self.seen.take(self.client, self.place, total, self)
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
            own: dict[str, Any] = {kept.name: getattr(given, kept.name) for kept in fields(given)}
            own |= {"data": given.data[:records], "each": each, "seen": seen}
            if isinstance(given, PrivateGradients):
                return train(PlantedSteps(**own))
            place = ask.task, ask.phase, ask.stage, ask.server_round
            return train(PlantedSum(**own, client=ask.client, place=place))

        return trained

    return Overseen(inner, around, asked), seen
