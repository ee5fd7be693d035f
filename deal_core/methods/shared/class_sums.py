"""Exact sums over a client's records of a task: count and sum of unit vectors for each label, and
one Gram matrix. It tells who is among few records, so a site gives none: simulations alone do."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deal_core.lora.payload import PayloadError
from deal_core.methods.interface import EmbeddedTask, Tensors

COUNT, SUM, GRAM = "count", "sum", "gram"
TOLERANCE = 1e-4
"""Relative error of what vectors add up to that rounding may make."""
ROUNDING = 1e-6
"""Error of a sum that has travelled in fixed point, for each example."""
MOST_EXAMPLES = 10_000_000
"""A larger count is a lie or a bug."""


def shapes(labels: int, size: int) -> Mapping[str, tuple[int, ...]]:
    """Name to shape; of the Gram matrix, which is symmetric, the upper triangle travels."""
    return {COUNT: (labels,), SUM: (labels, size), GRAM: (size * (size + 1) // 2,)}


def collect(task: EmbeddedTask) -> Tensors:
    """Return the sums of a client's vectors.

    Returns:
        ``count`` ``(labels,)``, ``sum`` ``(labels, size)``, ``gram`` ``(size (size + 1) / 2,)``:
        ``sum_x x x^T``, rows of its upper triangle. float64.
    """
    x = task.embeddings.double()
    total = torch.zeros(task.labels, x.shape[1], dtype=torch.float64)
    count = torch.bincount(task.targets, minlength=task.labels).double()
    return {COUNT: count, SUM: total.index_add_(0, task.targets, x), GRAM: triangle(x.T @ x)}


def triangle(matrix: Tensor) -> Tensor:
    """Return the upper triangle of a symmetric matrix, row after row."""
    rows, columns = torch.triu_indices(*matrix.shape)
    return matrix[rows, columns]


def symmetric(values: Tensor, size: int) -> Tensor:
    """Return the ``(size, size)`` matrix of which the upper triangle was sent."""
    rows, columns = torch.triu_indices(size, size)
    matrix = torch.zeros(size, size, dtype=values.dtype)
    matrix[rows, columns] = values
    matrix[columns, rows] = values
    return matrix


def check(sums: Tensors) -> None:
    """Check that unit vectors can have these sums.

    Raises:
        PayloadError: a count that is none, a sum longer than its count, a Gram matrix of another
            trace than the count, or with less scatter than the class means have.
    """
    count, total = sums[COUNT], sums[SUM]
    n = require_counts(count)
    if bool((total.norm(dim=1) > count * (1 + TOLERANCE)).any()):
        raise PayloadError("sum: longer than so many unit vectors can make it")
    gram = symmetric(sums[GRAM], total.shape[1])
    if abs(float(gram.trace()) - n) > TOLERANCE * n:
        raise PayloadError("gram: its trace is not the number of examples")
    if float(torch.linalg.eigvalsh(scatter(count, total, gram))[0]) < -ROUNDING * n:
        raise PayloadError("gram: less scatter than the sums have")


def require_counts(count: Tensor) -> float:
    """Return how many examples there are.

    Raises:
        PayloadError: a negative count, no whole number, too many, or none at all.
    """
    if bool((count < 0).any()) or bool((count != count.round()).any()):
        raise PayloadError("count: not whole numbers from 0")
    n = float(count.sum())
    if not 1 <= n <= MOST_EXAMPLES:
        raise PayloadError("count: out of bounds")
    return n


def scatter(count: Tensor, total: Tensor, gram: Tensor) -> Tensor:
    """Return the scatter within classes, ``sum_x x x^T - sum_c s_c s_c^T / n_c``."""
    scaled = total / filled(count).sqrt()[:, None]
    return gram - scaled.T @ scaled


def filled(count: Tensor) -> Tensor:
    """Return numbers of examples to divide by: 1 where there are none."""
    return torch.where(count > 0, count, 1.0)


def without_negative(matrix: Tensor) -> Tensor:
    """Return a symmetric matrix with its negative eigenvalues set to 0, which rounded sums may
    have; the very matrix where none is below rounding, as of exact sums."""
    room = 2 * ROUNDING * torch.eye(len(matrix), dtype=matrix.dtype)
    if int(torch.linalg.cholesky_ex(matrix + room).info) == 0:
        return matrix
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0.0)) @ vectors.T
