"""Baselines that train one adapter on task after task: ``sequential`` alone, the lower one, and
``lwf``, which distils its own past."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deal_core.config.experiment import AdapterConfig
from deal_core.config.method import DistillationConfig, MethodConfig
from deal_core.deal.distillation import distilled
from deal_core.deal.interface import LocalTask, Phase
from deal_core.deal.objective import plain
from deal_core.lora.state import State, continued, drop_task_start, snapshot_task_start
from deal_core.models import Encoded, LanguageModel
from deal_core.training.batching import Cache
from deal_core.training.loop import Objective


@dataclass(frozen=True)
class Sequential:
    """FedAvg of LoRA over a stream: nothing is retained. Attributes: ``adapter`` (ranks, alpha)."""

    adapter: AdapterConfig

    @property
    def phases(self) -> Sequence[Phase]:
        """None: rounds of learning alone."""
        return ()

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


@dataclass(frozen=True)
class HeldStart(Sequential):
    """The same, and the model at the start of the task is held for its length."""

    def begin_task(self, state: State, generator: torch.Generator) -> State:
        """Keep the adapter, and its start."""
        return snapshot_task_start(continued(state, self.adapter, generator))

    def end_task(self, state: State) -> State:
        """Keep the adapter, and its start no longer."""
        return drop_task_start(state)


@dataclass(frozen=True)
class Lwf(HeldStart):
    """Learning without forgetting: the outputs for earlier tasks, on the current task's inputs, are
    distilled from the model as it was at the start of the task. With weight 0 it is ``sequential``.
    Source: docs/method.md (M16) without labels of future tasks; Li & Hoiem, ECCV 2016, arXiv
    1606.09282.

    Attributes:
        distillation: weight.
    """

    distillation: DistillationConfig

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
        return distilled(model, state, task, data, cache, self.distillation, 0.0, False)


def make_sequential(method: MethodConfig, adapter: AdapterConfig) -> Sequential:
    """Build from the experiment; ``method`` has no key for it."""
    return Sequential(adapter)


def make_lwf(method: MethodConfig, adapter: AdapterConfig) -> Lwf:
    """Build from the experiment."""
    return Lwf(adapter, method.distillation)
