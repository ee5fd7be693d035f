"""Distillation for models that answer in words: the teacher is asked with the prompts of earlier
tasks, about the current texts, gives its own answers, and is matched word by word.

What the model would say if it were asked about an earlier task is what may be forgotten. The prompt
and the answer of the task at hand (:mod:`deal_core.methods.shared.distilled`) ask for something
else: they teach the old style on the new prompt. Source: docs/method.md (M55).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from deal_core.config.method import DistillationConfig
from deal_core.lora.adapter import fingerprint
from deal_core.lora.attach import at_task_start
from deal_core.lora.state import State
from deal_core.methods.interface import LocalTask, TaskPrompt
from deal_core.methods.shared.plain import plain
from deal_core.models import Encoded, ForwardOutput, GeneratingModel
from deal_core.models.generating import word_losses
from deal_core.training.batching import evaluation_batches
from deal_core.training.cache import Cache
from deal_core.training.containment import contained
from deal_core.training.distillation import distillation_losses, mean_per_example
from deal_core.training.objective import Objective
from deal_core.training.teacher import WordTeacher, word_teacher


def answers_distilled(
    model: GeneratingModel,
    state: State,
    task: LocalTask,
    data: Sequence[Encoded],
    cache: Cache,
    config: DistillationConfig,
) -> Objective:
    """Return ``CE + weight * KL(model at the start of the task || model)`` at the words of the
    answers that the teacher gives under the prompts of earlier tasks; plain cross-entropy where
    there is no earlier task, or the weight is 0.

    Args:
        model: holds ``state`` already.
        state: the start of the task is ``base + retained``.
        task: its labels, and the prompts of earlier tasks.
        data: the client's tokenised examples.
        cache: keeps the teacher's answers while ``retained`` and the prompts stay the same.
        config: weight, temperature.
    """
    learning = plain(model, task, data)
    if not task.prompts or not config.weight or task.joint_tasks:
        return learning
    basis = f"{fingerprint(state.retained)} {task.prompts} {len(data)}"
    asked, teacher = cache.get_or_compute(
        "answers", basis, lambda: ask(model, data, task.prompts, alone=task.protected)
    )
    return AnswersDistilled(model, learning, asked, teacher, config.weight, config.temperature)


def ask(
    model: GeneratingModel,
    data: Sequence[Encoded],
    prompts: Sequence[TaskPrompt],
    alone: bool = False,
) -> tuple[list[Encoded | None], WordTeacher]:
    """Return the texts as the teacher was asked about them, with its answers, and the teacher. A
    text is asked about under the prompt of one earlier task: which one follows from the text alone,
    so that an example's loss depends on no other example, and on no place in the data. Where each
    is asked about by itself, None stands for one about which the teacher could not be asked: what
    it does to the arithmetic stays its own.

    Args:
        model: holds the state of the round.
        data: the client's tokenised examples.
        prompts: of earlier tasks.
        alone: ask about each text by itself, so that not even rounding, which batch-mates change,
            can turn one answer into another.
    """
    asked: dict[int, Encoded | None] = {}
    chosen = [which(item, len(prompts)) for item in data]
    with at_task_start(model.module):
        for turn, prompt in enumerate(prompts):
            places = [i for i, own in enumerate(chosen) if own == turn]
            share = [data[i] for i in places]
            for batch in evaluation_batches(share, alone):
                texts = [share[i] for i in batch]
                work = partial(model.answered, texts, prompt.labels, prompt.instruction)
                found: Sequence[Encoded | None] | None = contained(work, alone)
                answered = [None] if found is None else found
                asked.update(zip((places[i] for i in batch), answered, strict=True))
    items = [asked[i] for i in range(len(data))]
    known = [text if item is None else item for item, text in zip(items, data, strict=True)]
    return items, word_teacher(model, known, alone=alone)


def which(item: Encoded, prompts: int) -> int:
    """Return the number of the prompt under which a text is asked about."""
    digest = hashlib.sha256(repr(item.text).encode()).digest()
    return int.from_bytes(digest[:8], "big") % prompts


@dataclass(frozen=True)
class AnswersDistilled:
    """Attributes: ``learning``, the objective of the task at hand; ``asked``, of each example its
    text as the ``teacher`` was asked about it, None: it could not be."""

    model: GeneratingModel
    learning: Objective
    asked: Sequence[Encoded | None]
    teacher: WordTeacher
    weight: float
    temperature: float

    def example_losses(self, batch: Sequence[int]) -> Tensor:
        """Return ``CE + weight * KL``, ``(batch,)``.

        Raises:
            ValueError: the teacher could not be asked about one of them.
        """
        asked = [item for item in (self.asked[i] for i in batch) if item is not None]
        if len(asked) < len(batch):
            raise ValueError("the teacher has no answer about an example")
        losses = self.learning.example_losses(batch)
        states, words = self.model.word_states(asked, ())
        kept = word_losses(self._divergence, states, torch.cat(self.teacher.states(batch)))
        return losses + self.weight * mean_per_example(kept, words)

    def _divergence(self, states: Tensor, teacher_states: Tensor) -> Tensor:
        """Return that of each word, ``(words,)``."""
        logits = self.model.word_logits(states)
        student = ForwardOutput(states, logits, [1] * len(logits), [logits.shape[1]])
        return distillation_losses(student, self.teacher.logits(teacher_states), self.temperature)

    def penalty(self) -> Tensor | None:
        """Return that of the task at hand."""
        return self.learning.penalty()
