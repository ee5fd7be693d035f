"""Gradient canaries: directions of made-up records that a mechanism must hide as any real one.

A canary's gradient has two entries of equal size and opposite sign. No two canaries share an
entry, so each is seen without the others, and thousands cost little. The two entries lie at the
same place in two layers of the same shape, wherever there are two: noise that such layers share
would cancel, and the canary would stand there bare.

Source: Steinke, Nasr & Jagielski, NeurIPS 2023, section 5.1 (canaries in gradient space); Nasr et
al., USENIX Security 2023 (one entry each).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deal_core.errors import UserError
from deal_core.lora.attach import ExampleLosses, learning_factors
from deal_core.randomness import seeded

ENTRY = 1 / math.sqrt(2)
"""Size of each of a direction's two entries."""

Shapes = tuple[tuple[str, tuple[int, ...]], ...]
"""Name and shape of every factor, by name."""
Scores = NDArray[np.float64]


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
        shapes = tuple((name, tuple(like[name].shape)) for name in sorted(like))
        return _entries(self.count, self.seed, self.repeat, shapes)

    def scores(self, like: Mapping[str, Tensor]) -> Scores:
        """Return ``(count,)``: how far what is given goes along every direction."""
        entries = self.entries(like)
        flat = np.concatenate([like[name].detach().cpu().numpy().ravel() for name in sorted(like)])
        pairs = flat[entries.places].astype(np.float64)
        scores: Scores = ENTRY * entries.signs * (pairs[:, 0] - pairs[:, 1])
        return scores


@lru_cache(maxsize=8)
def _entries(count: int, seed: int, repeat: int, shapes: Shapes) -> Entries:
    starts, end = [], 0
    for _, shape in shapes:
        starts.append(end)
        end += math.prod(shape)
    pairs = _pairs(shapes, starts)
    if count > len(pairs):
        raise UserError(
            f"--canaries {count}: what is trained has room for {len(pairs)} gradient canaries that "
            "share no entry; take so many, or train more (adapter.rank, adapter.target_modules)"
        )
    generator = seeded(seed, "canaries", repeat)
    chosen = torch.randperm(len(pairs), generator=generator)[:count].numpy()
    signs = torch.randint(2, (count,), generator=generator).numpy() * 2 - 1
    names = tuple(name for name, _ in shapes)
    return Entries(names, tuple(starts), pairs[chosen], signs.astype(np.float32))


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
        first, second = (_entry(factors, entries, p) for p in entries.places[number].tolist())
        weight = self.length * ENTRY * entries.signs[number] * self.canaries.included[number]
        return float(weight) * (first - second.to(first.device)).reshape(1)


def _entry(factors: Mapping[str, Tensor], entries: Entries, place: int) -> Tensor:
    """Return an entry of all factors laid end to end."""
    factor = bisect_right(entries.starts, place) - 1
    return factors[entries.names[factor]].flatten()[place - entries.starts[factor]]
