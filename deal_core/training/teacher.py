"""The teacher of a task: the model as it was at its start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from deal_core.lora.attach import at_task_start
from deal_core.models import Encoded, GeneratingModel, LanguageModel
from deal_core.training.batching import evaluation_batches
from deal_core.training.containment import contained

Teacher = Callable[[Sequence[int]], list[Tensor]]
"""Positions in the client's data to each example's logits, ``(rows, classes)``."""


@dataclass(frozen=True)
class WordTeacher:
    """Of the words of the examples' answers. Attributes: ``states``, positions in the client's data
    to what each example's logits follow from, ``(words, hidden)``."""

    model: GeneratingModel
    states: Callable[[Sequence[int]], list[Tensor]]

    def logits(self, states: Tensor) -> Tensor:
        """Return those that follow from states, ``(words, vocabulary)``."""
        with at_task_start(self.model.module):  # the head may be adapted, too
            return self.model.word_logits(states)

    def __call__(self, batch: Sequence[int]) -> list[Tensor]:
        """Return the logits of each example, ``(words, vocabulary)``."""
        states = self.states(batch)
        return list(torch.split(self.logits(torch.cat(states)), [len(own) for own in states]))


CACHED_FLOATS = 2**25
"""What the teacher may keep for one client's task (128 MB); beyond, it answers batch by batch."""


def make_teacher(
    model: LanguageModel,
    data: Sequence[Encoded],
    labels: Sequence[str],
    seen: Sequence[Sequence[str]],
    alone: bool = False,
) -> Teacher:
    """Return the teacher, asked once about all examples, in batches without gradients, where the
    answers fit into memory; otherwise it is asked again each time. Of a model that answers in words
    the states are kept from which the logits follow. ``alone``: asked about each by itself."""
    if isinstance(model, GeneratingModel):
        return word_teacher(model, data, labels, alone)

    def ask(batch: Sequence[int]) -> list[Tensor]:
        with at_task_start(model.module):
            learnt = model.forward_train([data[i] for i in batch], labels, seen)
        answers = list(torch.split(learnt.distillation_logits, list(learnt.rows)))
        # An example that gives no number must not change what is answered about the others.
        if len(batch) > 1 and not bool(learnt.distillation_logits.isfinite().all()):
            return [ask([i])[0] for i in batch]
        return answers

    known = kept(data, ask, alone)
    return ask if known is None else lambda batch: [known[i] for i in batch]


def kept(
    data: Sequence[Encoded], ask: Callable[[Sequence[int]], list[Tensor]], alone: bool = False
) -> dict[int, Tensor] | None:
    """Return what is answered about each example, asked in batches, or about each by itself, and
    then nothing about one that cannot be asked about; None where it does not fit into memory."""
    answers: dict[int, Tensor] = {}
    floats = 0
    for batch in evaluation_batches(data, alone):
        found = contained(partial(ask, batch), alone)
        if found is None:
            continue  # who asks for it meets the fault, and nobody else
        answers.update(zip(batch, found, strict=True))
        floats += sum(answer.numel() for answer in found)
        if floats * len(data) > CACHED_FLOATS * len(answers):
            return None
    return answers


def word_teacher(
    model: GeneratingModel,
    data: Sequence[Encoded],
    labels: Sequence[str] = (),
    alone: bool = False,
) -> WordTeacher:
    """Return the teacher of the words of the examples' answers, asked once about all examples where
    the states that these are predicted from fit into memory; ``alone``: again each time, for
    whether they fit depends on how long the answers of all are."""

    def ask(batch: Sequence[int]) -> list[Tensor]:
        with at_task_start(model.module):
            found, words = model.word_states([data[i] for i in batch], labels)
        return list(torch.split(found, words))

    known = None if alone else kept(data, ask)
    return WordTeacher(model, ask if known is None else lambda batch: [known[i] for i in batch])
