"""Components: what single tasks taught, kept apart within one retained adapter of fixed rank.

The sum of adapters of tasks that have nothing in common spoils each of them. Kept apart, each is
as it was learnt, and an answer takes one. The rows of the retained adapter are those of its
components, one after another; while they fit, nothing is lost. Beyond, the directions that carry
the least of their component go; where components would become too thin, the two that are most
alike become one. Source: docs/method.md (M70) to (M72).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from deal_core.lora.adapter import Adapter, compress, side_by_side, split, stack, zero_adapter
from deal_core.lora.state import Component, State

THINNEST = 2
"""Directions that each component keeps; where they would be fewer, two components become one."""


@dataclass(frozen=True)
class Kept:
    """A component with its factors: ``tasks`` that it answers, and its ``adapter`` (scaling 1), the
    directions of each layer by descending strength."""

    tasks: tuple[str, ...]
    adapter: Adapter


def kept_components(state: State) -> list[Kept]:
    """Return the components of a state, in order."""
    return [Kept(own.tasks, state.view(n).retained) for n, own in enumerate(state.components)]


def holding(state: State, components: Sequence[Kept]) -> State:
    """Return the state that retains these components."""
    if not components:
        return replace(state, retained=zero_adapter(state.retained.shapes, 1), components=())
    retained = components[0].adapter
    for each in components[1:]:
        retained = side_by_side(retained, each.adapter)
    ranks = tuple(Component(each.tasks, each.adapter.rank) for each in components)
    return replace(state, retained=retained, components=ranks)


def fitted(components: Iterable[Kept], limit: int) -> list[Kept]:
    """Return components whose ranks add up to at most ``limit``.

    The last direction that carries the least of its component (squared singular values, all
    layers) goes first. Where every component has ``THINNEST`` left, the two most alike are merged.
    """
    kept = list(components)
    energies = [_energies(each.adapter) for each in kept]
    ranks = [each.adapter.rank for each in kept]
    while sum(ranks) > limit:
        thick = [n for n, rank in enumerate(ranks) if rank > THINNEST]
        if thick:
            least = min(thick, key=lambda n: energies[n][ranks[n] - 1])
            ranks[least] -= 1
            continue
        if len(kept) == 1:
            ranks[0] = limit
            break
        cut = [_cut(each, rank) for each, rank in zip(kept, ranks, strict=True)]
        first, second = most_alike(cut)
        merged = merge(cut[first], cut[second])
        others = [each for n, each in enumerate(cut) if n not in (first, second)]
        return fitted([*others, merged], limit)
    return [_cut(each, rank) for each, rank in zip(kept, ranks, strict=True)]


def merge(first: Kept, second: Kept) -> Kept:
    """Return one component for the tasks of both: the best part, of the larger rank, of their mean
    weighted by how many tasks each answers."""
    total = len(first.tasks) + len(second.tasks)
    halves = [
        replace(each.adapter, scaling=each.adapter.scaling * len(each.tasks) / total)
        for each in (first, second)
    ]
    rank = max(first.adapter.rank, second.adapter.rank)
    return Kept((*first.tasks, *second.tasks), compress(stack(halves), rank))


def most_alike(components: Sequence[Kept]) -> tuple[int, int]:
    """Return the places of the two components whose updates have the largest cosine."""
    pairs = [(n, m) for n in range(len(components)) for m in range(n + 1, len(components))]
    return max(pairs, key=lambda pair: likeness(*(components[n].adapter for n in pair)))


def likeness(first: Adapter, second: Adapter) -> float:
    """Return the cosine of two updates over all layers, on factors: ``<B1 A1, B2 A2> / norms``."""
    dot = _product(first, second)
    size = _product(first, first) * _product(second, second)
    return dot / size**0.5 if size else 0.0


def _product(first: Adapter, second: Adapter) -> float:
    total = 0.0
    for name, f in first.layers.items():
        g = second.layers[name]
        total += float(((f.B.T.double() @ g.B.double()) * (f.A.double() @ g.A.double().T)).sum())
    return first.scaling * second.scaling * total


def _energies(adapter: Adapter) -> list[float]:
    """Share of each direction of a component in all that it does, ``rank`` values."""
    total = torch.zeros(adapter.rank, dtype=torch.float64)
    for factors in adapter.layers.values():
        total += (factors.B.double().norm(dim=0) * factors.A.double().norm(dim=1)).square()
    return (total / total.sum().clamp(min=1e-300)).tolist()


def _cut(kept: Kept, rank: int) -> Kept:
    if kept.adapter.rank == rank:
        return kept
    return replace(kept, adapter=split(kept.adapter, rank)[0])
