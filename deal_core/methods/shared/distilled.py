"""The objective that keeps a teacher's opinions: the model as it was at the start of the task."""

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
from deal_core.training.distillation import distillation_losses, merged
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
    log_prior: Tensor | None = None,
) -> Objective:
    """``CE + weight * KL(model at the start of the task || model)`` over the labels of each earlier
    task, or of all of them, and ``ahead`` times the same over those of tasks to come; plain
    cross-entropy where there is neither. A model that does not tell spaces apart has one opinion,
    of earlier tasks and with ``weight``, and none of tasks to come.

    The start of the task is ``base + retained``; its answers are kept in ``memory``. The
    ``log_prior`` of the task's labels goes to the cross-entropy.
    """
    choices = _choices(task, config, future if model.has_label_logits else 0.0)
    if not choices:
        return plain(model, task, data, log_prior)
    spaces = [space for space, _ in choices]
    basis = f"{fingerprint(state.retained)} {spaces}"
    teacher: Teacher = cache.get_or_compute(
        "teacher", basis, lambda: make_teacher(model, data, task.labels, spaces)
    )
    weights = [weight for _, weight in choices] if model.has_label_logits else [config.weight]
    return Distilled(
        model, task.labels, spaces, weights, data, teacher, config.temperature, log_prior
    )


def _choices(
    task: LocalTask, config: DistillationConfig, future: float
) -> list[tuple[Sequence[str], float]]:
    """What the teacher chooses between, earlier tasks first, and what each choice weighs.

    A task to come that has the labels of one that is known, in any order, is none: those are being
    learnt.
    """
    to_come = _unknown(task) if future else []
    choices: list[tuple[Sequence[str], float]] = []
    for group, weight in ((task.seen, config.weight), (to_come, future)):
        if group and weight:
            spaces = group if config.softmax == "per-task" else [merged(group)]
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
    log_prior: Tensor | None = None

    def example_losses(self, batch: Sequence[int]) -> Tensor:
        """``CE + sum of weight * KL``, ``(batch,)``."""
        items = [self.data[i] for i in batch]
        learnt = self.model.forward_train(items, self.labels, self.spaces, self.log_prior)
        teacher_logits = torch.cat(self.teacher(batch))
        kept = distillation_losses(learnt, teacher_logits, self.temperature, self.weights)
        return learnt.example_losses + kept

    def penalty(self) -> None:
        """Nothing beside the data."""
