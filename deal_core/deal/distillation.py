"""Distillation from the teacher of a task: the model as it was at its start.

An encoder's teacher chooses between the labels of other tasks (M16). One that answers in
words is asked with the prompts of earlier tasks about the current texts, gives its own answers, and
is matched word by word (M55): what it would say about an earlier task is what may be forgotten. The
published form asks with the prompt and the answer of the task at hand (M18). Source:
docs/method.md.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from deal_core.config.experiment import DistillationConfig
from deal_core.deal.interface import LocalTask, TaskPrompt
from deal_core.deal.objective import plain
from deal_core.lora.adapter import fingerprint
from deal_core.lora.attach import at_task_start
from deal_core.models.generating import GeneratingModel, word_losses
from deal_core.models.interface import Encoded, LanguageModel
from deal_core.models.tokens import TokenLabels
from deal_core.training.loop import Objective, contained, evaluation_batches

Teacher = Callable[[Sequence[int]], list[Tensor]]
"""Positions in the client's data to each example's logits, ``(rows, classes)``, or to the states
that logits follow from."""
CACHED_FLOATS = 2**25
"""What the teacher may keep for one client's task (128 MB); beyond, it answers batch by batch."""


def distilled(
    task: LocalTask, config: DistillationConfig, future: float, earlier_prompts: bool
) -> Objective:
    """Return the objective (M6): cross-entropy and distillation over labels of other tasks.

    Where there is no other task, or the weights are 0, it is plain cross-entropy. A model without
    label logits distils words, with ``config.weight``, where there is an earlier task.

    The task began with ``base + retained``; ``future`` weighs labels of future tasks, and
    ``earlier_prompts``: a generating model's teacher is asked with the prompts of earlier tasks.
    The cache keeps its answers while ``retained`` and the labels stay.
    """
    if isinstance(task.model, GeneratingModel):
        return words_distilled(task.model, task, config, earlier_prompts)
    choices = _choices(task, config, future)
    if not choices:
        return plain(task)
    model, data = task.model, task.data
    spaces = [space for space, _ in choices]
    basis = f"{fingerprint(task.state.retained)} {spaces} {len(data)}"
    teacher: Teacher = task.cache.get_or_compute(
        "teacher", basis, lambda: make_teacher(model, data, task.labels, spaces, task.protected)
    )
    return Distilled(model, task.labels, spaces, [weight for _, weight in choices], data, teacher)


def words_distilled(
    model: GeneratingModel,
    task: LocalTask,
    config: DistillationConfig,
    earlier_prompts: bool = True,
) -> Objective:
    """Return :class:`WordsDistilled`; plain cross-entropy where there is no earlier task, or the
    weight is 0. The cache keeps the teacher's answers while ``retained`` and the prompts stay the
    same."""
    learning, data = plain(task), task.data
    earlier = task.prompts if earlier_prompts else task.seen
    if not earlier or not config.weight or task.joint_tasks:
        return learning
    basis = f"{fingerprint(task.state.retained)} {task.prompts} {task.labels} {len(data)}"

    def asked() -> tuple[Sequence[Encoded | None], WordTeacher]:
        if earlier_prompts:
            return ask(model, data, task.prompts, alone=task.protected)
        return data, word_teacher(model, data, task.labels, task.protected)

    items, teacher = task.cache.get_or_compute("words", basis, asked)
    labels = () if earlier_prompts else task.labels
    return WordsDistilled(model, learning, items, labels, teacher, config.weight)


def _choices(
    task: LocalTask, config: DistillationConfig, future: float
) -> list[tuple[Sequence[str], float]]:
    """Return what the teacher chooses between, earlier tasks first, and what each choice weighs. A
    task to come that has the labels of one that is known, in any order, is none: those are being
    learnt."""
    known = {frozenset(space) for space in (task.labels, *task.seen)}
    to_come: list[Sequence[str]] = []
    for space in task.future() if future else ():
        if frozenset(space) not in known:
            known.add(frozenset(space))
            to_come.append(space)
    choices: list[tuple[Sequence[str], float]] = []
    for group, weight in ((task.seen, config.weight), (to_come, future)):
        if weight:
            choices += [(space, weight / len(group)) for space in group]
    return choices


TEMPERATURE = 2.0
"""Divides the logits of teacher and student: large makes their answers alike, and small ones count
more."""


@dataclass(frozen=True)
class Distilled(Objective):
    """Cross-entropy over ``labels``, and a teacher's opinion of every example over each of
    ``spaces``, with its weight."""

    model: LanguageModel
    labels: Sequence[str]
    spaces: Sequence[Sequence[str]]
    weights: Sequence[float]
    data: Sequence[Encoded]
    teacher: Teacher

    def example_losses(self, batch: Sequence[int]) -> Tensor:
        """Return ``CE + sum of weight * KL``, ``(batch,)``."""
        items = [self.data[i] for i in batch]
        learnt = self.model.forward_train(items, self.labels, self.spaces)
        teacher_logits = torch.cat(self.teacher(batch))
        kept = distillation_losses(
            learnt.distillation_logits, teacher_logits, learnt.spaces, self.weights
        )
        if learnt.rows:  # one for each word of a text
            parts = torch.split(kept, list(learnt.rows))
            kept = torch.stack([part.sum() / max(1, len(part)) for part in parts])
        return learnt.example_losses + kept


def distillation_losses(
    student: Tensor, teacher: Tensor, spaces: Sequence[int], weights: Sequence[float]
) -> Tensor:
    """Return ``T^2 KL(softmax(teacher / T) || softmax(student / T))`` of each row of logits,
    ``(rows, classes)``: the weighted sum over the spaces in which a choice is made, of so many
    classes each. The teacher is constant.

    0 where there are no classes, or where both agree; what the logits of one space have in common
    is free. ``T`` is ``TEMPERATURE``.

    Source: docs/method.md (M16), (M18); Hinton et al. 2015 (T^2 keeps the gradient's size); Li &
    Hoiem 2016 (LwF: each earlier task has a softmax of its own).
    """
    divergence = torch.zeros(student.shape[0], device=student.device)
    parts = (torch.split(logits, list(spaces), dim=1) for logits in (student, teacher.detach()))
    for share, own, wanted in zip(weights, *parts, strict=True):
        divergence = divergence + share * kl_div(
            log_softmax(own / TEMPERATURE, dim=1),
            log_softmax(wanted / TEMPERATURE, dim=1),
            reduction="none",
            log_target=True,
        ).sum(dim=1)
    return TEMPERATURE**2 * divergence


@dataclass(frozen=True)
class WordTeacher:
    """Of the words of the examples' answers. Attributes: ``states``, positions in the client's data
    to what each example's logits follow from, ``(words, hidden)``."""

    model: GeneratingModel
    states: Teacher

    def logits(self, states: Tensor) -> Tensor:
        """Return those that follow from states, ``(words, vocabulary)``."""
        with at_task_start(self.model.module):  # the head may be adapted, too
            return self.model.word_logits(states)


def make_teacher(
    model: LanguageModel,
    data: Sequence[Encoded],
    labels: Sequence[str],
    spaces: Sequence[Sequence[str]],
    alone: bool = False,
) -> Teacher:
    """Return the teacher, asked once about all examples, in batches without gradients, where the
    answers fit into memory; otherwise it is asked again each time. ``alone``: asked about each by
    itself."""

    def answers(batch: Sequence[int]) -> list[Tensor]:
        with at_task_start(model.module):
            learnt = model.forward_train([data[i] for i in batch], labels, spaces)
        # Each answer follows from its own example, also beside one that gives no number.
        if len(batch) > 1 and not bool(learnt.distillation_logits.isfinite().all()):
            return [answers([i])[0] for i in batch]
        rows = list(learnt.rows) or [1] * len(batch)
        return list(torch.split(learnt.distillation_logits, rows))

    if alone and isinstance(model, TokenLabels):
        return answers  # whether answers fit into memory depends on how many words all texts have
    return _remembered(data, answers, alone)


def word_teacher(
    model: GeneratingModel, data: Sequence[Encoded], labels: Sequence[str] = (), alone: bool = False
) -> WordTeacher:
    """Return the teacher of the words of the examples' answers, asked once about all examples where
    the states that these are predicted from fit into memory; ``alone``: again each time, for
    whether they fit depends on how long the answers of all are."""

    def states(batch: Sequence[int]) -> list[Tensor]:
        with at_task_start(model.module):
            found, words = model.word_states([data[i] for i in batch], labels)
        return list(torch.split(found, words))

    return WordTeacher(model, states if alone else _remembered(data, states))


def _remembered(data: Sequence[Encoded], ask: Teacher, alone: bool = False) -> Teacher:
    """Return what tells the answers about all examples, asked now, in batches or about each by
    itself; ``ask`` itself where they do not fit into memory."""
    answers: dict[int, Tensor] = {}
    floats = 0
    for batch in evaluation_batches(data, alone):
        found = contained(partial(ask, batch), alone)
        if found is None:
            continue  # the fault occurs again where this example is asked for, and there alone
        answers.update(zip(batch, found, strict=True))
        floats += sum(answer.numel() for answer in found)
        if floats * len(data) > CACHED_FLOATS * len(answers):
            return ask
    return lambda batch: [answers[i] for i in batch]


def ask(
    model: GeneratingModel,
    data: Sequence[Encoded],
    prompts: Sequence[TaskPrompt],
    alone: bool = False,
) -> tuple[list[Encoded | None], WordTeacher]:
    """Return the texts as the teacher was asked about them, with its answers, and the teacher. A
    text is asked about under the prompt of one earlier task: which one follows from the text alone,
    so that an example's loss depends on no other example, and on no place in the data. ``alone``:
    each text is asked about by itself, so that not even rounding, which batch-mates change, can
    turn one answer into another; None stands for one about which the teacher could not be asked.
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
class WordsDistilled(Objective):
    """``CE + weight * KL(model at the start of the task || model)`` at the words of answers: those
    that the teacher gives under the prompts of earlier tasks, or the right ones of the task."""

    model: GeneratingModel
    learning: Objective
    """That of the task at hand."""
    asked: Sequence[Encoded | None]
    """Of each example its text as the ``teacher`` was asked about it; None: it could not be."""
    labels: Sequence[str]
    """Of the task, where answers are labels of its own."""
    teacher: WordTeacher
    weight: float

    def example_losses(self, batch: Sequence[int]) -> Tensor:
        """Return ``CE + weight * KL``, ``(batch,)``.

        Raises:
            ValueError: the teacher could not be asked about one of them.
        """
        asked = [item for item in (self.asked[i] for i in batch) if item is not None]
        if len(asked) < len(batch):
            raise ValueError("the teacher has no answer about an example")
        losses = self.learning.example_losses(batch)
        states, words = self.model.word_states(asked, self.labels)
        kept = word_losses(self._divergence, states, torch.cat(self.teacher.states(batch)))
        means = torch.stack([part.mean() for part in torch.split(kept, words)])
        return losses + self.weight * means

    def _divergence(self, states: Tensor, teacher_states: Tensor) -> Tensor:
        """Return that of each word, ``(words,)``."""
        student, teacher = self.model.word_logits(states), self.teacher.logits(teacher_states)
        return distillation_losses(student, teacher, [student.shape[1]], [1.0])

    def penalty(self) -> Tensor | None:
        """Return that of the task at hand."""
        return self.learning.penalty()
