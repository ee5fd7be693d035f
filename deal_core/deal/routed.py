"""DEAL that routes: a component of the retained adapter for each task, and a router among them.

A task goes on from a copy of the last component, without a teacher: nothing that is learnt later
can reach what stays. At its end the adapter becomes a component, filtered and cut as in
:mod:`deal_core.deal.retention`, and all components together keep to ``adapter.retained_rank``.
Which of them answers a text follows from class means of the frozen model; a task that writes has
one class, all of its texts.

The sum of adapters of tasks that have nothing in common spoils each of them; kept apart, each is as
it was learnt. The rows of the retained adapter are those of its components, one after another;
while they fit, nothing is lost. Beyond, the directions that carry the least of their component go;
where components would become too thin, the two that are most alike become one. Source:
docs/method.md (M70) to (M72).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from deal_core.config.experiment import AdapterConfig, MethodConfig, RetentionConfig
from deal_core.deal.interface import LocalTask, Phase
from deal_core.deal.objective import plain
from deal_core.deal.retention import retain
from deal_core.lora import adapter as lora
from deal_core.lora.state import Component, State
from deal_core.training.loop import Objective

THINNEST = 2
"""Directions that each component keeps; where they would be fewer, two components become one."""


@dataclass(frozen=True)
class RoutedDeal:
    """Attributes: as of :class:`~deal_core.deal.method.Deal`."""

    adapter: AdapterConfig
    method: MethodConfig
    phases: tuple[Phase, ...] = ()

    def begin_task(
        self, state: State, generator: torch.Generator, tasks: Sequence[str] = ()
    ) -> State:
        """Return a state whose current adapter is a copy of the last component, fresh where there
        is none; what is beyond the adapter's rank (an exact rule's residual) is residual again. A
        task that returns goes on with the component that answers it, which, where it is its own, is
        no longer retained until the task ends."""
        kept = kept_components(state)
        own = [each for each in kept if tasks and set(tasks) <= set(each.tasks)]
        shapes, rank = state.retained.shapes, self.adapter.rank
        start = next(iter(own or kept[-1:]), None)
        before = start.adapter if start else lora.zero_adapter(shapes, 0)
        scaling = self.adapter.lora_alpha / rank
        taken = before if start else lora.zero_adapter(shapes, 1)
        copied, beyond = lora.split(before, min(rank, before.rank))
        fresh = lora.orthogonal_init(taken, rank - copied.rank, scaling, generator)
        others = [each for each in kept if set(each.tasks) != set(tasks)]
        return replace(
            holding(state, others),
            current=lora.side_by_side(fresh, _scaled(copied, scaling)),
            residual=beyond if beyond.rank else None,
            num_reference_directions=0,
        )

    def end_task(self, state: State, tasks: Sequence[str] = ()) -> State:
        """Return a state that retains what was learnt as the component of these tasks."""
        learnt = lora.stack(part for part in (state.current, state.residual) if part is not None)
        rank = min(learnt.rank, self.adapter.retained_rank)
        retention = self.method.retention
        own = Kept(tuple(tasks), retain(learnt, rank, retention))
        others = [_without(each, tasks) for each in kept_components(state)]
        kept = fitted([*filter(None, others), own], self.adapter.retained_rank, retention)
        current = lora.zero_adapter(state.current.shapes, self.adapter.rank, state.current.scaling)
        return replace(holding(state, kept), current=current, residual=None)

    def objective(self, task: LocalTask) -> Objective:
        """Return cross-entropy: what is apart needs no teacher."""
        return plain(task)


def _scaled(adapter: lora.Adapter, scaling: float) -> lora.Adapter:
    layers = {
        name: lora.LoraFactors(f.A, f.B * (adapter.scaling / scaling))
        for name, f in adapter.layers.items()
    }
    return lora.Adapter(layers, scaling)


def _without(kept: Kept, tasks: Sequence[str]) -> Kept | None:
    """The component for its other tasks; None: there are none."""
    left = tuple(task for task in kept.tasks if task not in tasks)
    return replace(kept, tasks=left) if left else None


@dataclass(frozen=True)
class Kept:
    """A component with its factors: ``tasks`` that it answers, and its ``adapter`` (scaling 1), the
    directions of each layer by descending strength."""

    tasks: tuple[str, ...]
    adapter: lora.Adapter


def kept_components(state: State) -> list[Kept]:
    """Return the components of a state, in order."""
    return [Kept(own.tasks, state.view(n).retained) for n, own in enumerate(state.components)]


def holding(state: State, components: Sequence[Kept]) -> State:
    """Return the state that retains these components."""
    if not components:
        return replace(state, retained=lora.zero_adapter(state.retained.shapes, 1), components=())
    retained = components[0].adapter
    for each in components[1:]:
        retained = lora.side_by_side(retained, each.adapter)
    ranks = tuple(Component(each.tasks, each.adapter.rank) for each in components)
    return replace(state, retained=retained, components=ranks)


def fitted(components: Iterable[Kept], limit: int, retention: RetentionConfig) -> list[Kept]:
    """Return components whose ranks add up to at most ``limit``.

    The last direction that carries the least of its component (squared singular values, all
    layers) goes first. Where every component has ``THINNEST`` left, the two most alike are merged,
    and what they have beyond one component's rank is what the retention filter takes for noise.
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
        cut[second] = merge(cut[first], cut[second], retention)
        del cut[first]
        return fitted(cut, limit, retention)
    return [_cut(each, rank) for each, rank in zip(kept, ranks, strict=True)]


def merge(first: Kept, second: Kept, retention: RetentionConfig) -> Kept:
    """Return one component for the tasks of both: what the retention leaves, of the larger rank, of
    their mean weighted by how many tasks each answers."""
    total = len(first.tasks) + len(second.tasks)
    halves = [
        replace(each.adapter, scaling=each.adapter.scaling * len(each.tasks) / total)
        for each in (first, second)
    ]
    rank = max(first.adapter.rank, second.adapter.rank)
    return Kept((*first.tasks, *second.tasks), retain(lora.stack(halves), rank, retention))


def most_alike(components: Sequence[Kept]) -> tuple[int, int]:
    """Return the places of the two components whose updates have the largest cosine."""
    pairs = [(n, m) for n in range(len(components)) for m in range(n + 1, len(components))]
    return max(pairs, key=lambda pair: likeness(*(components[n].adapter for n in pair)))


def likeness(first: lora.Adapter, second: lora.Adapter) -> float:
    """Return the cosine of two updates over all layers, on factors: ``<B1 A1, B2 A2> / norms``."""
    dot = _product(first, second)
    size = _product(first, first) * _product(second, second)
    return dot / size**0.5 if size else 0.0


def _product(first: lora.Adapter, second: lora.Adapter) -> float:
    total = 0.0
    for name, f in first.layers.items():
        g = second.layers[name]
        total += float(((f.B.T.double() @ g.B.double()) * (f.A.double() @ g.A.double().T)).sum())
    return first.scaling * second.scaling * total


def _energies(adapter: lora.Adapter) -> list[float]:
    """Share of each direction of a component in all that it does, ``rank`` values."""
    total = torch.zeros(adapter.rank, dtype=torch.float64)
    for factors in adapter.layers.values():
        total += (factors.B.double().norm(dim=0) * factors.A.double().norm(dim=1)).square()
    return (total / total.sum().clamp(min=1e-300)).tolist()


def _cut(kept: Kept, rank: int) -> Kept:
    if kept.adapter.rank == rank:
        return kept
    return replace(kept, adapter=lora.split(kept.adapter, rank)[0])
