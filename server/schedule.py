"""Which step comes when: a pure list that a run walks through and a resumed run continues."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from deal_core.methods import LEARN, Phase


@dataclass(frozen=True)
class Step:
    """One step of a run; a checkpoint follows each.

    Attributes:
        kind: ``zero-shot`` (evaluate the start), ``round`` (one round of local updates),
            ``begin-phase`` (lay out what the next rounds train), ``end-task`` (end it and
            evaluate).
        task_index: position of the task in the stream, from 0; -1 for zero-shot.
        server_round: from 1 in every task, over all phases; 0 where the step is no round.
        phase: of the method, to which the step belongs.
        together: in a round all tasks of the stream are learnt at once.
    """

    kind: Literal["zero-shot", "round", "begin-phase", "end-task"]
    task_index: int
    server_round: int = 0
    phase: str = LEARN
    together: bool = False


def synchronous(tasks: int, phases: Collection[Phase]) -> list[Step]:
    """All clients learn one task at a time, through the rounds of every phase.

    What the model knew at the start is measured after the first round: learning begins at once.
    """
    steps: list[Step] = []
    for index in range(tasks):
        done = 0
        for phase in phases:
            if done:
                steps.append(Step("begin-phase", index, phase=phase.name))
            rounds = range(done + 1, done + phase.rounds + 1)
            steps += [Step("round", index, number, phase.name) for number in rounds]
            done += phase.rounds
        steps.append(Step("end-task", index))
    steps.insert(1, Step("zero-shot", -1))
    return steps


def joint(tasks: int, phases: Collection[Phase]) -> list[Step]:
    """All clients learn all tasks at once: one stage, with one task's rounds of learning; nothing
    comes before it that a further phase could consolidate it with."""
    rounds = next(iter(phases)).rounds
    steps = [Step("round", 0, number, together=True) for number in range(1, rounds + 1)]
    steps.insert(1, Step("zero-shot", -1))
    return [*steps, Step("end-task", 0)]


SCHEDULES: Mapping[str, Callable[[int, Collection[Phase]], list[Step]]] = {
    "synchronous": synchronous,
    "joint": joint,
}
"""``stream.schedule`` to the steps for a number of tasks and the phases of each."""
