"""Which step comes when: a pure list that a run walks through and a resumed run continues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

from deal_core.methods import Phase
from deal_core.wire.instruction import LEARN

StepKind = Literal["zero-shot", "round", "end-stage"]


@dataclass(frozen=True)
class Step:
    """One step of a run; a checkpoint follows each.

    Attributes:
        kind: ``zero-shot`` (evaluate the start), ``round`` (one round of local updates),
            ``end-stage`` (end it and evaluate).
        stage: what lies between two consolidations, from 0; -1 for zero-shot.
        server_round: from 1 in every stage, over all phases; 0 where the step is no round.
        phase: of the method, to which the step belongs.
        round: rounds of the whole run up to the step, its own included.
    """

    kind: StepKind
    stage: int
    server_round: int = 0
    phase: str = LEARN
    round: int = 0


def schedule(rounds: Sequence[int], further: Sequence[Phase] = ()) -> list[Step]:
    """Return the steps of a run.

    What the model knew at the start is measured after the first round: learning begins at once.

    Args:
        rounds: of learning, for each stage; at least one.
        further: phases that every stage has after them.
    """
    steps: list[Step] = []
    for stage, count in enumerate(rounds):
        steps += [Step("round", stage, number) for number in range(1, count + 1)]
        done = count
        for phase in further:
            numbers = range(done + 1, done + phase.rounds + 1)
            steps += [Step("round", stage, number, phase.name) for number in numbers]
            done += phase.rounds
        steps.append(Step("end-stage", stage))
    steps.insert(1, Step("zero-shot", -1))
    counted = accumulate(step.kind == "round" for step in steps)
    return [replace(step, round=int(count)) for step, count in zip(steps, counted, strict=True)]


def rounds_of(stage: int, steps: Sequence[Step]) -> int:
    """How many rounds a stage has, of all phases."""
    return sum(step.kind == "round" and step.stage == stage for step in steps)
