"""The plain objective: cross-entropy on the labels of the task, or of each of several tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from deal_core.methods.interface import LocalTask, Objective
from deal_core.methods.mixed import Mixed
from deal_core.models import Encoded, LanguageModel


def plain(model: LanguageModel, task: LocalTask, data: Sequence[Encoded]) -> Objective:
    """Cross-entropy, whether the client learns one task or several at once."""
    if not task.together:
        return Plain(model, task.labels, data)
    examples = [(n, example) for n, share in enumerate(task.together) for example in share.data]
    return Mixed(model, [share.labels for share in task.together], examples)


@dataclass(frozen=True)
class Plain:
    """Attributes: the model, the task's ``labels`` and the client's ``data``."""

    model: LanguageModel
    labels: Sequence[str]
    data: Sequence[Encoded]

    def example_losses(self, batch: Sequence[int]) -> Tensor:
        """Cross-entropy per example, ``(batch,)``."""
        return self.model.learn([self.data[i] for i in batch], self.labels, ()).example_losses

    def penalty(self) -> None:
        """Nothing beside the data."""
