"""The method: fresh adapter, distillation while learning, consolidation into what is retained.

Source: METHOD, "One task". A task starts with a fresh current adapter in the orthogonal
complement of what is retained; clients learn it while they distil the model as it was at the
start of the task; at the end both adapters are stacked, and the best part of fixed rank is
retained. The size of the model does not grow with the number of tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deal_core.adapters import compress, fresh_adapter, stack, zero_adapter
from deal_core.config import AdapterConfig, MethodConfig
from deal_core.memory import Memory
from deal_core.methods.distilled import distilled
from deal_core.methods.interface import LocalTask, Objective, State
from deal_core.models import Encoded, LanguageModel


@dataclass(frozen=True)
class Deal:
    """Attributes: ``adapter`` (ranks, alpha) and ``method`` (switches) of the experiment."""

    adapter: AdapterConfig
    method: MethodConfig

    def begin_task(self, state: State, generator: torch.Generator) -> State:
        """Start a fresh current adapter outside the retained directions."""
        scaling = self.adapter.lora_alpha / self.adapter.rank
        current = fresh_adapter(state.retained, self.adapter.rank, scaling, generator)
        return State(current, state.retained)

    def end_task(self, state: State) -> State:
        """Stack both adapters and keep the best part of rank ``retained_rank`` (exact while
        everything learnt so far fits into it)."""
        retained = compress(stack(state.parts()), self.adapter.retained_rank)
        current = zero_adapter(state.current.shapes, self.adapter.rank, state.current.scaling)
        return State(current, retained)

    def objective(
        self,
        model: LanguageModel,
        state: State,
        task: LocalTask,
        data: Sequence[Encoded],
        memory: Memory,
    ) -> Objective:
        """``CE + weight * KL(model at the start of the task || model)`` over earlier labels."""
        return distilled(model, state, task, data, memory, self.method.distillation)


def make_deal(method: MethodConfig, adapter: AdapterConfig) -> Deal:
    """Build from the experiment."""
    return Deal(adapter, method)
