"""The ordinary gradient of one batch, with the objective's penalty, outside of a training."""

from __future__ import annotations

from collections.abc import Sequence

from deal_core.models import Encoded
from deal_core.training.loop import Objective, mean_gradient, penalise


def accumulate(
    objective: Objective, data: Sequence[Encoded], batch: Sequence[int], tokens: int
) -> float:
    """Add the gradient to that of the factors; return the loss with the penalty."""
    return mean_gradient(objective, data, batch, tokens) + penalise(objective)
