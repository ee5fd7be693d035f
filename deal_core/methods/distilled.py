"""The objective that keeps a teacher's opinions: the model as it was at the start of the task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deal_core.adapters import fingerprint
from deal_core.distillation import distillation_losses, merged
from deal_core.memory import Memory
from deal_core.method_config import DistillationConfig
from deal_core.methods.interface import LocalTask, Objective, State
from deal_core.methods.plain import plain
from deal_core.models import Encoded, LanguageModel
from deal_core.teacher import Teacher, make_teacher


def distilled(
    model: LanguageModel,
    state: State,
    task: LocalTask,
    data: Sequence[Encoded],
    memory: Memory,
    config: DistillationConfig,
) -> Objective:
    """``CE + weight * KL(model at the start of the task || model)`` over the labels of each earlier
    task, or of all of them; plain cross-entropy in the first task, or with weight 0.

    The start of the task is ``base + retained``; its answers are kept in ``memory``.
    """
    if config.weight == 0 or not task.seen:
        return plain(model, task, data)
    seen = task.seen if config.spaces == "tasks" else (merged(task.seen),)
    basis = f"{fingerprint(state.retained)} {seen}"
    teacher: Teacher = memory.once(
        "teacher", basis, lambda: make_teacher(model, data, task.labels, seen)
    )
    return Distilled(model, task.labels, seen, data, teacher, config)


@dataclass(frozen=True)
class Distilled:
    """Cross-entropy over ``labels``, and a teacher's opinion of every example over ``seen``."""

    model: LanguageModel
    labels: Sequence[str]
    seen: Sequence[Sequence[str]]
    data: Sequence[Encoded]
    teacher: Teacher
    config: DistillationConfig

    def example_losses(self, batch: Sequence[int]) -> Tensor:
        """``CE + weight * KL``, ``(batch,)``."""
        items = [self.data[i] for i in batch]
        learnt = self.model.learn(items, self.labels, self.seen)
        opinions = torch.cat(self.teacher(batch))
        kept = distillation_losses(learnt, opinions, self.config.temperature)
        return learnt.example_losses + self.config.weight * kept

    def penalty(self) -> None:
        """Nothing beside the data."""
