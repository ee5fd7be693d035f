"""The seam of a continual-learning method: what the server keeps, what a client minimises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from deal_core.adapters import Adapter
from deal_core.memory import Memory
from deal_core.models import Encoded, LanguageModel


@dataclass(frozen=True, eq=False)
class State:
    """The global model beyond the frozen base. Two states are equal if they are the same object.

    Attributes:
        current: what this task teaches (trained in rounds).
        retained: all earlier tasks (scaling 1); ``base + retained`` is the model as it was at
            the start of the task.
        residual: what this task changes beside ``current`` (scaling 1): what an exact
            aggregation rule found no room for; None where there is none.
    """

    current: Adapter
    retained: Adapter
    residual: Adapter | None = None

    def parts(self) -> list[Adapter]:
        """All adapters; their sum is the whole update of the base model."""
        return [a for a in (self.retained, self.residual, self.current) if a is not None]


@dataclass(frozen=True)
class LocalTask:
    """What a client knows of the task at hand.

    Attributes:
        labels: the task's public label space.
        seen: labels of all earlier tasks; empty in the first.
    """

    labels: Sequence[str]
    seen: Sequence[str]


class Objective(Protocol):
    """What one client minimises in one round."""

    def example_losses(self, batch: Sequence[int]) -> Tensor:
        """Losses of these examples (positions in the client's data), ``(batch,)``, each
        independent of its batch-mates; their mean over the batch is minimised."""

    def penalty(self) -> Tensor | None:
        """A term that reads no data, added once a step; None where there is none."""


class Method(Protocol):
    """A method reads no data on the server and sends nothing but adapters from a client."""

    def begin_task(self, state: State, generator: torch.Generator) -> State:
        """Server, before the first round of a task."""

    def end_task(self, state: State) -> State:
        """Server, after the last round of a task."""

    def objective(
        self,
        model: LanguageModel,
        state: State,
        task: LocalTask,
        data: Sequence[Encoded],
        memory: Memory,
    ) -> Objective:
        """Client, once a round: ``model`` holds ``state`` already."""
