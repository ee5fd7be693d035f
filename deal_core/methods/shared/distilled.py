"""Cross-entropy plus distillation from the model as it was at the start of the task.

Source: docs/method.md (M6), (M16) to (M18).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deal_core.config.method import DistillationConfig
from deal_core.lora.adapter import fingerprint
from deal_core.lora.state import State
from deal_core.methods.interface import LocalTask
from deal_core.methods.shared.plain import plain
from deal_core.models import Encoded, LanguageModel
from deal_core.training.cache import Cache
from deal_core.training.distillation import distillation_losses, joint_labels
from deal_core.training.objective import Objective
from deal_core.training.teacher import Teacher, make_teacher


def distilled(
    model: LanguageModel,
    state: State,
    task: LocalTask,
    data: Sequence[Encoded],
    cache: Cache,
    config: DistillationConfig,
    future: float,
) -> Objective:
    """Return the objective (M6): cross-entropy and distillation over labels of other tasks.

    Where there is no other task, or the weights are 0, it is plain cross-entropy. A model without
    label logits distils words, with ``config.weight``, where there is an earlier task.

    Args:
        model: holds ``state`` already.
        state: the start of the task is ``base + retained``.
        task: its labels, and those of earlier and of future tasks.
        data: the client's tokenised examples.
        cache: keeps the teacher's answers while ``retained`` and the labels stay the same.
        config: weight of earlier labels, temperature, softmax.
        future: weight of labels of future tasks; 0: none.
    """
    choices = _choices(task, config, future if model.has_label_logits else 0.0)
    if not choices:
        return plain(model, task, data)
    spaces = [space for space, _ in choices]
    basis = f"{fingerprint(state.retained)} {spaces} {len(data)}"
    teacher: Teacher = cache.get_or_compute(
        "teacher", basis, lambda: make_teacher(model, data, task.labels, spaces, task.protected)
    )
    weights = [weight for _, weight in choices] if model.has_label_logits else [config.weight]
    return Distilled(model, task.labels, spaces, weights, data, teacher, config.temperature)


def _choices(
    task: LocalTask, config: DistillationConfig, future: float
) -> list[tuple[Sequence[str], float]]:
    """Return what the teacher chooses between, earlier tasks first, and what each choice weighs.

    A task to come that has the labels of one that is known, in any order, is none: those are being
    learnt.
    """
    to_come = _unknown(task) if future else []
    choices: list[tuple[Sequence[str], float]] = []
    for group, weight in ((task.seen, config.weight), (to_come, future)):
        if group and weight:
            spaces = group if config.softmax == "per-task" else [joint_labels(group)]
            choices += [(space, weight / len(spaces)) for space in spaces]
    return choices


def _unknown(task: LocalTask) -> list[Sequence[str]]:
    """Label spaces of tasks to come, each once."""
    known = {frozenset(space) for space in (task.labels, *task.seen)}
    spaces = []
    for space in task.future():
        if frozenset(space) not in known:
            known.add(frozenset(space))
            spaces.append(space)
    return spaces


@dataclass(frozen=True)
class Distilled:
    """Cross-entropy over ``labels``, and a teacher's opinion of every example over each of
    ``spaces``, with its weight."""

    model: LanguageModel
    labels: Sequence[str]
    spaces: Sequence[Sequence[str]]
    weights: Sequence[float]
    data: Sequence[Encoded]
    teacher: Teacher
    temperature: float

    def example_losses(self, batch: Sequence[int]) -> Tensor:
        """Return ``CE + sum of weight * KL``, ``(batch,)``."""
        items = [self.data[i] for i in batch]
        learnt = self.model.forward_train(items, self.labels, self.spaces)
        teacher_logits = torch.cat(self.teacher(batch))
        kept = distillation_losses(learnt, teacher_logits, self.temperature, self.weights)
        return learnt.example_losses + kept

    def penalty(self) -> None:
        """Return None: there is no term beside the data."""
