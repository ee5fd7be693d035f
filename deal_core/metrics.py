"""Measures of continual learning on the accuracy matrix.

``R[i][j]`` is the accuracy (0 to 1) on task ``j`` after stage ``i``, for all ``j``, tasks still to
come included; None: not measured, which the last row is whole of, and every entry that is named
below but for (M36). A stage ends with a consolidation. ``zero_shot[j]`` is the accuracy before any
training. Source: docs/method.md (M32) to (M36), after Lopez-Paz & Ranzato 2017 and Chaudhry et
al. 2018.

Where all clients learn one task a stage, task ``i`` in stage ``i``, these are the measures of the
literature. Where clients have orders of their own a task has no one moment: ``begun[j]`` is the
stage in which its first learner starts, ``learnt[j]`` the one in which its last learner ends. The
row ``R[learnt[j]]`` has its learning accuracy (Riemer et al., ICLR 2019), the row before
``begun[j]`` what was known before anyone learnt it. Both are ``[0, 1, ..., T - 1]`` in the first
case.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from statistics import fmean

Matrix = Sequence[Sequence[float | None]]


def spans(tasks: Sequence[str], stages: Sequence[Collection[str]]) -> tuple[list[int], list[int]]:
    """Return ``begun`` and ``learnt`` of each task, from the tasks that are worked on in each
    stage. One that nobody works on is begun after the last stage, and learnt in the last."""
    places = [[i for i, worked in enumerate(stages) if task in worked] for task in tasks]
    begun = [min(found, default=len(stages)) for found in places]
    return begun, [max(found, default=len(stages) - 1) for found in places]


def in_turn(tasks: Sequence[str], stages: Sequence[Collection[str]]) -> bool:
    """Return whether stage ``i`` is task ``i`` and nothing else."""
    return [list(worked) for worked in stages] == [[task] for task in tasks]


def average_accuracy(matrix: Matrix) -> float:
    """Return the mean accuracy over all tasks after the last stage (M32)."""
    return fmean(last_row(matrix))


def learning_accuracy(matrix: Matrix, learnt: Sequence[int]) -> float:
    """Return the mean of ``R[learnt[j]][j]`` (M33): accuracy on every task just after it was learnt
    (Riemer et al. 2019)."""
    return fmean(measured(matrix, i, j) for j, i in enumerate(learnt))


def backward_transfer(matrix: Matrix, learnt: Sequence[int]) -> float:
    """Return the mean of ``R[last][j] - R[learnt[j]][j]`` over the tasks learnt before the last
    stage (M34); negative means forgetting.

    0 where there are none: there is nothing to forget.
    """
    last = len(matrix) - 1
    earlier = [(j, i) for j, i in enumerate(learnt) if i < last]
    return _mean([measured(matrix, last, j) - measured(matrix, i, j) for j, i in earlier])


def forward_transfer(matrix: Matrix, zero_shot: Sequence[float], begun: Sequence[int]) -> float:
    """Return the mean of ``R[begun[j] - 1][j] - zero_shot[j]`` over the tasks begun after the first
    stage (M35).

    What other tasks did for one not yet trained; negative means that they hurt it. 0 where all
    tasks begin in the first stage.
    """
    later = [(j, i) for j, i in enumerate(begun) if i > 0]
    return _mean([measured(matrix, i - 1, j) - zero_shot[j] for j, i in later])


def forgetting(matrix: Matrix, learnt: Sequence[int]) -> float:
    """Return the mean of ``max_i R[i][j] - R[last][j]`` over the tasks learnt before the last stage
    and the ``i`` that were measured (M36); never negative."""
    last = len(matrix) - 1
    earlier = [j for j, i in enumerate(learnt) if i < last]
    best = {j: max(row[j] or 0.0 for row in matrix) for j in earlier}
    return _mean([best[j] - measured(matrix, last, j) for j in earlier])


def last_row(matrix: Matrix) -> list[float]:
    """Return the accuracies after the last stage, of all tasks."""
    return [measured(matrix, -1, j) for j in range(len(matrix[-1]))]


def measured(matrix: Matrix, i: int, j: int) -> float:
    """Return ``R[i][j]``. ValueError: it was not measured."""
    value = matrix[i][j]
    if value is None:
        raise ValueError(f"task {j} was not measured after stage {i}")
    return value


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else 0.0
