"""The seam of a continual-learning method: what the server keeps, what a client minimises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Share:
    """A client's own training data of one task, and the task's public label space."""

    labels: Sequence[str]
    data: Sequence[Encoded]


class Kept(Protocol):
    """What a client keeps from task to task, on its own disk; it never leaves."""

    def once(self, tasks: int, basis: str, make: Callable[[int, Tensors], Tensors]) -> Tensors:
        """Return what is kept of the client's first ``tasks`` tasks and ``basis`` (equal when all
        it depends on is).

        At first it is made, ``make(before, tensors)``, from what was kept of the largest number
        ``before`` that is smaller; from ``(0, {})`` where nothing was.
        """


@dataclass(frozen=True)
class Past:
    """What a client still has of the tasks that it worked on itself before the one at hand.

    Attributes:
        shares: one per such task, in the client's order; read when called.
        kept: what it keeps beside its data.
    """

    shares: Sequence[Callable[[], Share]]
    kept: Kept


@dataclass(frozen=True)
class LocalTask:
    """What a client knows of the task at hand.

    Attributes:
        labels: the task's public label space.
        seen: labels of the other tasks that some client had met before the stage; empty in the
            first.
        past: what the client has of its own earlier tasks; None in its first.
    """

    labels: Sequence[str]
    seen: Sequence[str]
    past: Past | None = None


class Objective(Protocol):
    """What one client minimises in one round."""

    def example_losses(self, batch: Sequence[int]) -> Tensor:
        """Losses of these examples (positions in the client's data), ``(batch,)``, each
        independent of its batch-mates; their mean over the batch is minimised."""

    def penalty(self) -> Tensor | None:
        """A term that reads none of the task's data, added once a step; None where there is
        none."""


class Method(Protocol):
    """A method reads no data on the server and sends nothing but adapters from a client."""

    def begin_task(self, state: State, generator: torch.Generator) -> State:
        """Server, before the first round of a stage (which is a task where all clients work on
        the same one)."""

    def end_task(self, state: State) -> State:
        """Server, after the last round of a stage."""

    def objective(
        self,
        model: LanguageModel,
        state: State,
        task: LocalTask,
        data: Sequence[Encoded],
        memory: Memory,
    ) -> Objective:
        """Client, once a round: ``model`` holds ``state`` already."""
