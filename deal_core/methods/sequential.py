"""Baseline ``sequential``: one adapter, trained on task after task, nothing retained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deal_core.config.experiment import AdapterConfig
from deal_core.config.method import MethodConfig
from deal_core.lora.state import State
from deal_core.methods.interface import LocalTask, Phase
from deal_core.methods.shared.continued import continued
from deal_core.methods.shared.plain import plain
from deal_core.models import Encoded, LanguageModel
from deal_core.training.cache import Cache
from deal_core.training.objective import Objective


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
        cache: Cache,
    ) -> Objective:
        """Cross-entropy."""
        return plain(model, task, data)


def make_sequential(method: MethodConfig, adapter: AdapterConfig) -> Sequential:
    """Build from the experiment; ``method`` has no key for it."""
    return Sequential(adapter)
