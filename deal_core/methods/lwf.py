"""Baseline ``lwf``: learning without forgetting, one adapter that distils its own past.

As ``sequential``, the same adapter of the same rank, plus distillation of the outputs for
earlier tasks, on the current task's inputs, from the model as it was at the start of the task.
With ``method.distillation.weight = 0`` it is ``sequential``. Source: docs/method.md (M16) without
labels of future tasks; Li & Hoiem, ECCV 2016, arXiv 1606.09282.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deal_core.config.experiment import AdapterConfig
from deal_core.config.method import DistillationConfig, MethodConfig
from deal_core.lora.state import State
from deal_core.methods.interface import LocalTask, Phase
from deal_core.methods.shared.answers import answers_distilled
from deal_core.methods.shared.continued import continued
from deal_core.methods.shared.distilled import distilled
from deal_core.methods.shared.task_start import drop_task_start, snapshot_task_start
from deal_core.models import Encoded, GeneratingModel, LanguageModel
from deal_core.training.cache import Cache
from deal_core.training.objective import Objective


@dataclass(frozen=True)
class Lwf:
    """Attributes: ``adapter`` (ranks, alpha), and weight and temperature of ``distillation``."""

    adapter: AdapterConfig
    distillation: DistillationConfig
    phases: tuple[Phase, ...] = ()

    def begin_task(self, state: State, generator: torch.Generator) -> State:
        """Keep the adapter; its start is the teacher."""
        return snapshot_task_start(continued(state, self.adapter, generator))

    def end_task(self, state: State) -> State:
        """Keep the adapter, and the teacher no longer."""
        return drop_task_start(state)

    def objective(
        self,
        model: LanguageModel,
        state: State,
        task: LocalTask,
        data: Sequence[Encoded],
        cache: Cache,
    ) -> Objective:
        """Return ``CE + weight * KL(model at the start of the task || model)`` over earlier
        labels."""
        if isinstance(model, GeneratingModel) and self.distillation.prompts == "earlier":
            return answers_distilled(model, state, task, data, cache, self.distillation)
        return distilled(model, state, task, data, cache, self.distillation, future=0.0)


def make_lwf(method: MethodConfig, adapter: AdapterConfig) -> Lwf:
    """Build from the experiment."""
    return Lwf(adapter, method.distillation)
