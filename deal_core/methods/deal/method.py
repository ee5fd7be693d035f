"""The method: fresh adapter, controlled update, distillation while learning, retention.

Source: docs/method.md (M4) to (M6), (M8), (M9), (M15), (M16). A task starts with a fresh current
adapter in the orthogonal complement of what is retained; clients learn it while they distil the
model as it was at the start of the task, and pay for interference with what is retained; at the end
both adapters are stacked, filtered, and the best part of fixed rank is retained, by the server
alone. The size of the model does not grow with the number of tasks. Every part has a switch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deal_core.config.experiment import AdapterConfig
from deal_core.config.method import MethodConfig
from deal_core.errors import choose
from deal_core.lora.adapter import (
    fingerprint,
    orthogonal_init,
    stack,
    zero_adapter,
)
from deal_core.lora.state import State
from deal_core.methods.deal.analytic_head import prototype_phases
from deal_core.methods.deal.controlled_update import Anchor, make_anchors, update_penalty
from deal_core.methods.deal.live_update import beside_current, live_update
from deal_core.methods.deal.retention import GAINS, retain
from deal_core.methods.interface import LocalTask, Phase
from deal_core.methods.shared.answers import answers_distilled
from deal_core.methods.shared.continued import continued
from deal_core.methods.shared.distilled import distilled
from deal_core.methods.shared.penalised import Penalised
from deal_core.methods.shared.task_start import drop_task_start, snapshot_task_start
from deal_core.models import Encoded, GeneratingModel, LanguageModel
from deal_core.training.cache import Cache
from deal_core.training.objective import Objective


@dataclass(frozen=True)
class Deal:
    """Attributes: ``adapter`` (ranks, alpha) and ``method`` (switches) of the experiment;
    ``phases``: the analytic head, if it is on."""

    adapter: AdapterConfig
    method: MethodConfig
    phases: tuple[Phase, ...] = ()

    def begin_task(self, state: State, generator: torch.Generator) -> State:
        """Return a state with a fresh current adapter, outside the retained directions unless told
        not to (M4). Without retention the adapter that is there goes on."""
        if not self.method.retention.enabled:
            return snapshot_task_start(continued(state, self.adapter, generator))
        nothing = zero_adapter(state.retained.shapes, 1)
        avoided = state.retained if self.method.orthogonal_init else nothing
        rank, scaling = self.adapter.rank, self.adapter.lora_alpha / self.adapter.rank
        fresh = orthogonal_init(avoided, rank, scaling, generator)
        return replace(state, current=fresh, residual=None, num_reference_directions=0)

    def end_task(self, state: State) -> State:
        """Return a state that retains, of both adapters stacked, the best part of rank
        ``retained_rank`` of what passes the filter (exact while everything learnt so far fits, and
        no noise floor is given)."""
        if not self.method.retention.enabled:
            return drop_task_start(state)
        everything = stack(state.parts())
        retained = retain(everything, self.adapter.retained_rank, self.method.retention)
        current = zero_adapter(state.current.shapes, self.adapter.rank, state.current.scaling)
        return replace(
            state, current=current, retained=retained, residual=None, num_reference_directions=0
        )

    def objective(
        self,
        model: LanguageModel,
        state: State,
        task: LocalTask,
        data: Sequence[Encoded],
        cache: Cache,
    ) -> Objective:
        """Return ``CE + weight * KL(model at the start of the task || model)`` over earlier labels,
        ``future_weight`` times the same over labels of future tasks, and the penalty of the
        controlled update. A model that answers in words is asked with the prompts of earlier tasks
        instead."""
        losses = self._losses(model, state, task, data, cache)
        if not self.method.update.enabled:
            return losses
        device = next(model.module.parameters()).device
        anchors: dict[str, Anchor] = cache.get_or_compute(
            "anchors", fingerprint(state.retained), lambda: make_anchors(state.retained, device)
        )
        beside = beside_current(state, device)

        def price() -> Tensor:
            update = live_update(model.module, beside)
            return update_penalty(update, anchors, self.method.update)

        return Penalised(losses, price)

    def _losses(
        self,
        model: LanguageModel,
        state: State,
        task: LocalTask,
        data: Sequence[Encoded],
        cache: Cache,
    ) -> Objective:
        config = self.method.distillation
        if isinstance(model, GeneratingModel) and config.prompts != "current":
            return answers_distilled(model, state, task, data, cache, config)
        return distilled(model, state, task, data, cache, config, config.future_weight)


def make_deal(method: MethodConfig, adapter: AdapterConfig) -> Deal:
    """Return the method of an experiment.

    Raises:
        UserError: unknown filter.
    """
    choose("method.retention.filter", method.retention.filter, GAINS)
    return Deal(adapter, method, prototype_phases(method.prototype))
