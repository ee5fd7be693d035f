"""The plain objective: cross-entropy on the task's labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from deal_core.models import Encoded, LanguageModel


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
