"""The plain objective: cross-entropy on the labels of the task, or of each of several tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from deal_core.methods.interface import LocalTask
from deal_core.methods.shared.mixed import Mixed
from deal_core.models import Encoded, LanguageModel
from deal_core.training.objective import Objective


def plain(model: LanguageModel, task: LocalTask, data: Sequence[Encoded]) -> Objective:
    """Return cross-entropy on one task, or on several at once."""
    if not task.joint_tasks:
        return Plain(model, task.labels, data)
    examples = [(n, example) for n, share in enumerate(task.joint_tasks) for example in share.data]
    return Mixed(model, [share.labels for share in task.joint_tasks], examples)


@dataclass(frozen=True)
class Plain:
    """Attributes: the model, the task's ``labels`` and the client's ``data``."""

    model: LanguageModel
    labels: Sequence[str]
    data: Sequence[Encoded]

    def example_losses(self, batch: Sequence[int]) -> Tensor:
        """Return cross-entropy per example, ``(batch,)``."""
        items = [self.data[i] for i in batch]
        return self.model.forward_train(items, self.labels, ()).example_losses

    def penalty(self) -> None:
        """Return None: there is no term beside the data."""
