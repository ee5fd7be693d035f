"""What is minimised on a task at hand: cross-entropy on its labels, or on those of each of several
tasks that are learnt at once; and a term beside the data. DEAL's whole objective:
:mod:`deal_core.deal.method`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from deal_core.deal.interface import LocalTask, TaskDataset
from deal_core.models.interface import Encoded, LanguageModel
from deal_core.training.loop import Objective

Placed = tuple[int, Encoded]
"""Which of several tasks, by its position among them, and the example."""


def plain(task: LocalTask) -> Objective:
    """Return cross-entropy on one task, or on several at once."""
    if not task.joint_tasks:
        return Plain(task.model, task.labels, task.data)
    examples = [(n, example) for n, share in enumerate(task.joint_tasks) for example in share.data]
    return Mixed(task.model, [share.labels for share in task.joint_tasks], examples)


@dataclass(frozen=True)
class Plain(Objective):
    """Attributes: the model, the task's ``labels`` and the client's ``data``."""

    model: LanguageModel
    labels: Sequence[str]
    data: Sequence[Encoded]

    def example_losses(self, batch: Sequence[int]) -> Tensor:
        """Return cross-entropy per example, ``(batch,)``."""
        items = [self.data[i] for i in batch]
        return self.model.forward_train(items, self.labels, ()).example_losses


@dataclass(frozen=True)
class Mixed(Objective):
    """The same for tasks that are learnt at once: their label ``spaces``, and the ``examples`` of
    all, in the order of the client's data."""

    model: LanguageModel
    spaces: Sequence[Sequence[str]]
    examples: Sequence[Placed]

    def example_losses(self, batch: Sequence[int]) -> Tensor:
        """Return cross-entropy per example, ``(batch,)``."""
        return losses_by_task(self.model, self.spaces, [self.examples[i] for i in batch])


def losses_by_task(
    model: LanguageModel, spaces: Sequence[Sequence[str]], examples: Sequence[Placed]
) -> Tensor:
    """Return cross-entropy of every example over the labels of its task, ``(examples,)``, in one
    forward pass for each task that occurs; ``spaces``: label spaces of the tasks."""
    order: list[int] = []
    losses: list[Tensor] = []
    for task, labels in enumerate(spaces):
        places = [k for k, (own, _) in enumerate(examples) if own == task]
        if places:
            items = [examples[k][1] for k in places]
            losses.append(model.forward_train(items, labels, ()).example_losses)
            order += places
    return torch.cat(losses)[torch.tensor(order).argsort()]


@dataclass(frozen=True)
class Penalised(Objective):
    """Attributes: the ``objective`` on the data, and the ``term`` that is added once a step (None
    where no factor that learns in this round is in it)."""

    objective: Objective
    term: Callable[[], Tensor | None]

    def example_losses(self, batch: Sequence[int]) -> Tensor:
        """Return the losses of the objective on the data, ``(batch,)``."""
        return self.objective.example_losses(batch)

    def penalty(self) -> Tensor | None:
        """Return the sum of the objective's own penalty and the term; None where there is
        neither."""
        parts = [part for part in (self.objective.penalty(), self.term()) if part is not None]
        return torch.stack(parts).sum() if parts else None


def under_all_labels(tasks: Sequence[TaskDataset]) -> list[TaskDataset]:
    """Return the same examples, each among the labels of all the tasks; labels of equal name are
    one."""
    labels = tuple(dict.fromkeys(chain.from_iterable(task.labels for task in tasks)))
    place = {label: position for position, label in enumerate(labels)}
    return [
        TaskDataset(
            labels, [replace(each, target=place[task.labels[each.target]]) for each in task.data]
        )
        for task in tasks
    ]
