"""Baseline ``sequential``: one adapter, trained on task after task, nothing retained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deal_core.config import AdapterConfig
from deal_core.memory import Memory
from deal_core.method_config import MethodConfig
from deal_core.methods.continued import continued
from deal_core.methods.interface import LocalTask, Objective, Phase, State
from deal_core.methods.plain import plain
from deal_core.models import Encoded, LanguageModel


@dataclass(frozen=True)
class Sequential:
    """FedAvg of LoRA over a stream: the lower baseline."""

    adapter: AdapterConfig
    phases: tuple[Phase, ...] = ()

    def begin_task(self, state: State, generator: torch.Generator) -> State:
        """Keep the adapter; make it before the first task."""
        return continued(state, self.adapter, generator)

    def end_task(self, state: State) -> State:
        """Keep everything as it is."""
        return state

    def objective(
        self,
        model: LanguageModel,
        state: State,
        task: LocalTask,
        data: Sequence[Encoded],
        memory: Memory,
    ) -> Objective:
        """Cross-entropy."""
        return plain(model, task, data)


def make_sequential(method: MethodConfig, adapter: AdapterConfig) -> Sequential:
    """Build from the experiment; ``method`` has no key for it."""
    return Sequential(adapter)
