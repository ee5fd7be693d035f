"""Which step comes when: a pure list that a run walks through and a resumed run continues."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Step:
    """One step of a run; a checkpoint follows each.

    Attributes:
        kind: ``zero-shot`` (evaluate the start), ``round`` (one round of local updates),
            ``end-task`` (consolidate and evaluate).
        task_index: position of the task in the stream, from 0; -1 for zero-shot.
        server_round: from 1 in every task; 0 where the step is no round.
        together: in a round all tasks of the stream are learnt at once.
    """

    kind: Literal["zero-shot", "round", "end-task"]
    task_index: int
    server_round: int = 0
    together: bool = False


def synchronous(tasks: int, rounds: int) -> list[Step]:
    """All clients learn one task at a time, ``rounds`` rounds each.

    What the model knew at the start is measured after the first round: learning begins at once.
    """
    steps: list[Step] = []
    for index in range(tasks):
        steps += [Step("round", index, number) for number in range(1, rounds + 1)]
        steps.append(Step("end-task", index))
    steps.insert(1, Step("zero-shot", -1))
    return steps


def joint(tasks: int, rounds: int) -> list[Step]:
    """All clients learn all tasks at once: one stage, with the rounds of one task."""
    steps = [Step("round", 0, number, together=True) for number in range(1, rounds + 1)]
    steps.insert(1, Step("zero-shot", -1))
    return [*steps, Step("end-task", 0)]


SCHEDULES: Mapping[str, Callable[[int, int], list[Step]]] = {
    "synchronous": synchronous,
    "joint": joint,
}
"""``stream.schedule`` to the steps for a number of tasks and of rounds per task."""
