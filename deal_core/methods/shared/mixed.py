"""Cross-entropy on examples of several tasks, each over the labels of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deal_core.methods.interface import TaskDataset
from deal_core.models import Encoded, LanguageModel
from deal_core.training.distillation import joint_labels

Placed = tuple[int, Encoded]
"""Which of several tasks, by its position among them, and the example."""


def losses_by_task(
    model: LanguageModel, spaces: Sequence[Sequence[str]], examples: Sequence[Placed]
) -> Tensor:
    """Return cross-entropy of every example over the labels of its task, ``(examples,)``.

    Args:
        model: one forward pass for each task that occurs.
        spaces: label spaces of the tasks, by their position.
        examples: at least one.
    """
    order: list[int] = []
    losses: list[Tensor] = []
    for task, labels in enumerate(spaces):
        places = [k for k, (own, _) in enumerate(examples) if own == task]
        if places:
            items = [examples[k][1] for k in places]
            losses.append(model.forward_train(items, labels, ()).example_losses)
            order += places
    return torch.cat(losses)[torch.tensor(order).argsort()]


def under_all_labels(tasks: Sequence[TaskDataset]) -> list[TaskDataset]:
    """Return the same examples, each among the labels of all the tasks; labels of equal name are
    one."""
    labels = joint_labels(task.labels for task in tasks)
    place = {label: position for position, label in enumerate(labels)}
    return [
        TaskDataset(
            labels, [replace(each, target=place[task.labels[each.target]]) for each in task.data]
        )
        for task in tasks
    ]


@dataclass(frozen=True)
class Mixed:
    """The plain objective for tasks that are learnt at once.

    Attributes:
        spaces: label spaces of the tasks.
        examples: of all tasks; a position in them is one in the client's data.
    """

    model: LanguageModel
    spaces: Sequence[Sequence[str]]
    examples: Sequence[Placed]

    def example_losses(self, batch: Sequence[int]) -> Tensor:
        """Return cross-entropy per example, ``(batch,)``."""
        return losses_by_task(self.model, self.spaces, [self.examples[i] for i in batch])

    def penalty(self) -> None:
        """Return None: there is no term beside the data."""
