"""What a client minimises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Objective(Protocol):
    """What one client minimises in one round."""

    def example_losses(self, batch: Sequence[int]) -> Tensor:
        """Return losses of these examples (positions in the client's data), ``(batch,)``, each
        independent of its batch-mates; their mean over the batch is minimised."""

    def penalty(self) -> Tensor | None:
        """Return a term that reads none of the task's data, added once a step; None: there is
        none."""
        return None
