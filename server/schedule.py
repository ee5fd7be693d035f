"""Which step comes when: a pure list that a run walks through and a resumed run continues."""

from __future__ import annotations

from collections.abc import Collection
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
    """

    kind: Literal["zero-shot", "round", "begin-phase", "end-task"]
    task_index: int
    server_round: int = 0
    phase: str = LEARN


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
