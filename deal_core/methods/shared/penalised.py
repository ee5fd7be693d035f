"""An objective with a term beside the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deal_core.training.objective import Objective


@dataclass(frozen=True)
class Penalised:
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
