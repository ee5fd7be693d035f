"""Which step comes when: a pure list that a run walks through and a resumed run continues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Step:
    """One step of a run; a checkpoint follows each.

    Attributes:
        kind: ``zero-shot`` (evaluate the start), ``round`` (one round of local updates),
            ``end-stage`` (consolidate and evaluate).
        stage: what lies between two consolidations, from 0; -1 for zero-shot.
        server_round: from 1 in every stage; 0 where the step is no round.
    """

    kind: Literal["zero-shot", "round", "end-stage"]
    stage: int
    server_round: int = 0


def schedule(rounds: Sequence[int]) -> list[Step]:
    """The steps of a run.

    What the model knew at the start is measured after the first round: learning begins at once.

    Args:
        rounds: of each stage, at least one.
    """
    steps: list[Step] = []
    for stage, count in enumerate(rounds):
        steps += [Step("round", stage, number) for number in range(1, count + 1)]
        steps.append(Step("end-stage", stage))
    steps.insert(1, Step("zero-shot", -1))
    return steps
