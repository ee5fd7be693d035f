"""DEAL: cross-entropy, distillation and a price of interference; then retention.

In a task every client minimises, over the factors ``A``, ``B`` of the current adapter,

    CE(base + retained + s B A)  +  D  +  R(s B A)

    D = T^2 [weight KL(base + retained || model) over earlier labels + future_weight KL(...) over
        labels to come]
    R = lambda1 sum_k w_k iota_k^2 + lambda2 ||outside of retained directions||_F^2,

and at its end the server retains ``best part of rank r of U rho(S) V^T = retained + s B A``. A task
starts with a fresh adapter in the orthogonal complement of what is retained; class means answer
beside the model. The size of the model does not grow with the number of tasks. Every part has a
switch. Source: docs/method.md (M4) to (M6), (M8), (M9), (M15), (M16).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deal_core.config.experiment import AdapterConfig, MethodConfig
from deal_core.deal.class_means import sum_phases
from deal_core.deal.controlled_update import (
    Anchor,
    beside_current,
    live_update,
    make_anchors,
    update_penalty,
)
from deal_core.deal.distillation import distilled
from deal_core.deal.interface import LocalTask, Phase
from deal_core.deal.objective import Penalised
from deal_core.deal.retention import RETENTIONS, retain
from deal_core.deal.routed import RoutedDeal
from deal_core.errors import choose
from deal_core.lora.adapter import fingerprint, orthogonal_init, stack, zero_adapter
from deal_core.lora.state import State, continued, drop_task_start, snapshot_task_start
from deal_core.training.loop import Objective


@dataclass(frozen=True)
class Deal:
    """Attributes: ``adapter`` (ranks, alpha) and ``method`` (switches) of the experiment;
    ``phases``: class sums, if class means are on."""

    adapter: AdapterConfig
    method: MethodConfig
    phases: tuple[Phase, ...] = ()

    def begin_task(
        self, state: State, generator: torch.Generator, tasks: Sequence[str] = ()
    ) -> State:
        """Return a state with a fresh current adapter, outside the retained directions unless told
        not to (M4). Without retention the adapter that is there goes on."""
        if self.method.retention.filter == "none":
            return snapshot_task_start(continued(state, self.adapter, generator))
        rank, scaling = self.adapter.rank, self.adapter.lora_alpha / self.adapter.rank
        fresh = orthogonal_init(state.retained, rank, scaling, generator)
        return replace(state, current=fresh, residual=None, num_reference_directions=0)

    def end_task(self, state: State, tasks: Sequence[str] = ()) -> State:
        """Return a state that retains, of both adapters stacked, the best part of rank
        ``retained_rank`` (exact while everything learnt so far fits)."""
        if self.method.retention.filter == "none":
            return drop_task_start(state)
        everything = stack(state.parts())
        retained = retain(everything, self.adapter.retained_rank, self.method.retention)
        current = zero_adapter(state.current.shapes, self.adapter.rank, state.current.scaling)
        return replace(
            state, current=current, retained=retained, residual=None, num_reference_directions=0
        )

    def objective(self, task: LocalTask) -> Objective:
        """Return the formula at the top of this file."""
        config = self.method.distillation
        losses = distilled(task, config, config.future_weight, True)
        if not (self.method.update.lambda1 or self.method.update.lambda2):
            return losses
        module, retained = task.model.module, task.state.retained
        device = next(module.parameters()).device
        anchors: dict[str, Anchor] = task.cache.get_or_compute(
            "anchors", fingerprint(retained), lambda: make_anchors(retained, device)
        )
        beside = beside_current(task.state, device)

        def price() -> Tensor:
            update = live_update(module, beside)
            return update_penalty(update, anchors, self.method.update)

        return Penalised(losses, price)


def make_deal(method: MethodConfig, adapter: AdapterConfig) -> Deal | RoutedDeal:
    """Return the method of an experiment.

    Raises:
        UserError: unknown retention.
    """
    choose("method.retention.filter", method.retention.filter, {**RETENTIONS, "none": None})
    if method.retention.apart:
        return RoutedDeal(adapter, method, sum_phases(method.prototype, routes=True))
    return Deal(adapter, method, sum_phases(method.prototype))
