"""Measures of continual learning on the accuracy matrix.

``R[i][j]`` is the accuracy (0 to 1) on task ``j`` after training task ``i``, for all ``j``,
tasks still to come included. ``zero_shot[j]`` is the accuracy before any training.
Source: METHOD, "Measures" (Lopez-Paz & Ranzato 2017; Chaudhry et al. 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

Matrix = Sequence[Sequence[float]]


def average_accuracy(matrix: Matrix) -> float:
    """Mean accuracy over all tasks after the last one."""
    return fmean(matrix[-1])


def learning_accuracy(matrix: Matrix) -> float:
    """Mean of ``R[j][j]``: accuracy on every task just after it was learnt (Riemer et al. 2019).

    One row for several tasks: all were learnt at once, and it is the average accuracy.
    """
    if len(matrix) == 1:
        return average_accuracy(matrix)
    return fmean(matrix[j][j] for j in range(len(matrix)))


def backward_transfer(matrix: Matrix) -> float:
    """Mean of ``R[T][j] - R[j][j]`` over all but the last task; negative means forgetting.

    0 for a single task: there is nothing to forget.
    """
    last = len(matrix) - 1
    return _mean([matrix[last][j] - matrix[j][j] for j in range(last)])


def forward_transfer(matrix: Matrix, zero_shot: Sequence[float]) -> float:
    """Mean of ``R[j-1][j] - zero_shot[j]`` over all but the first task.

    What earlier tasks did for one not yet trained; negative means that they hurt it.
    """
    return _mean([matrix[j - 1][j] - zero_shot[j] for j in range(1, len(matrix))])


def forgetting(matrix: Matrix) -> float:
    """Mean of ``max_i R[i][j] - R[T][j]`` over all but the last task; never negative."""
    last = len(matrix) - 1
    return _mean([max(row[j] for row in matrix) - matrix[last][j] for j in range(last)])


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else 0.0
