"""DEAL that routes: a component of the retained adapter for each task, and a router among them.

A task goes on from a copy of the last component, without a teacher: nothing that is learnt later
can reach what stays. At its end the adapter becomes a component, filtered and cut as in
:mod:`deal_core.deal.retention`, and all components together keep to ``adapter.retained_rank``.
Which of them answers a text follows from class means of the frozen model; a task that writes has
one class, all of its texts. Source: docs/method.md (M70) to (M72).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from deal_core.config.experiment import AdapterConfig, MethodConfig
from deal_core.deal.components import Kept, fitted, holding, kept_components
from deal_core.deal.interface import LocalTask, Phase
from deal_core.deal.objective import plain
from deal_core.deal.retention import retain
from deal_core.lora.adapter import (
    Adapter,
    LoraFactors,
    orthogonal_init,
    side_by_side,
    stack,
    zero_adapter,
)
from deal_core.lora.state import State
from deal_core.training.loop import Objective


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
        is none; a task that returns goes on with its own component, which is no longer retained
        until the task ends."""
        kept = kept_components(state)
        own = [each for each in kept if set(each.tasks) == set(tasks)]
        shapes, rank = state.retained.shapes, self.adapter.rank
        start = next(iter(own or kept[-1:]), None)
        before = start.adapter if start else zero_adapter(shapes, 0)
        scaling = self.adapter.lora_alpha / rank
        taken = before if start else zero_adapter(shapes, 1)
        fresh = orthogonal_init(taken, rank - min(rank, before.rank), scaling, generator)
        others = [each for each in kept if each not in own]
        current = side_by_side(fresh, _scaled(before, scaling))
        return replace(
            holding(state, others), current=current, residual=None, num_reference_directions=0
        )

    def end_task(self, state: State, tasks: Sequence[str] = ()) -> State:
        """Return a state that retains what was learnt as the component of these tasks."""
        learnt = stack(part for part in (state.current, state.residual) if part is not None)
        rank = min(learnt.rank, self.adapter.retained_rank)
        own = Kept(tuple(tasks), retain(learnt, rank, self.method.retention))
        others = [_without(each, tasks) for each in kept_components(state)]
        kept = fitted([*filter(None, others), own], self.adapter.retained_rank)
        current = zero_adapter(state.current.shapes, self.adapter.rank, state.current.scaling)
        return replace(holding(state, kept), current=current, residual=None)

    def objective(self, task: LocalTask) -> Objective:
        """Return cross-entropy: what is apart needs no teacher."""
        return plain(task)


def _scaled(adapter: Adapter, scaling: float) -> Adapter:
    """The same update with a scaling of ``scaling``."""
    layers = {
        name: LoraFactors(f.A, f.B * (adapter.scaling / scaling))
        for name, f in adapter.layers.items()
    }
    return Adapter(layers, scaling)


def _without(kept: Kept, tasks: Sequence[str]) -> Kept | None:
    """The component for its other tasks; None: there are none."""
    left = tuple(task for task in kept.tasks if task not in tasks)
    return replace(kept, tasks=left) if left else None
