"""What a text is answered with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """What a text is.

    Attributes:
        task: the one that was told, or the one whose label it is.
        label: of the largest score; of equal ones the first.
        probability: softmax of the scores over the labels that were to choose from; not calibrated.
        runner_up: the second; None where there was one label alone.
        runner_up_probability: as of the first.
    """

    task: str
    label: str
    probability: float
    runner_up: str | None
    runner_up_probability: float | None


@dataclass(frozen=True)
class Written:
    """What a model has written to a text.

    Attributes:
        task: the one that was told.
        answer: up to its end, or ``model.max_new_tokens``.
    """

    task: str
    answer: str
