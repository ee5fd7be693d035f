"""Sums over a client's records of a task: count and sum of embeddings for each label, and one Gram
matrix. Class means and a shared covariance follow from their sums over clients, exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from deal_core.lora.payload import PayloadError
from deal_core.methods.interface import EmbeddedTask, SumsOnWire, Tensors
from deal_core.wire.codec import LEVELS
from deal_core.wire.sum_codes import CORRELATIONS, ROWS

COUNT, SUM, GRAM, SCATTER, WHOLE = "count", "sum", "gram", "scatter", "whole"
TOLERANCE = 1e-4
"""Relative error of what unit vectors add up to that rounding may make."""
ROUNDING = 1e-6
"""Error of a sum that has travelled in float32, for each example."""
MOST_EXAMPLES = 10_000_000
"""A larger count is a lie or a bug."""


def shapes(labels: int, size: int) -> Mapping[str, tuple[int, ...]]:
    """Name to shape; of the Gram matrix, which is symmetric, the upper triangle travels."""
    return {COUNT: (labels,), SUM: (labels, size), GRAM: (size * (size + 1) // 2,)}


def collect(task: EmbeddedTask) -> Tensors:
    """Return the sums of the embeddings of the model now.

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
    _require_short(total, count * (1 + TOLERANCE))
    gram = symmetric(sums[GRAM], total.shape[1])
    if abs(float(gram.trace()) - n) > TOLERANCE * n:
        raise PayloadError("gram: its trace is not the number of examples")
    _require_positive(scatter(count, total, gram), -ROUNDING * n)


def _require_short(total: Tensor, longest: Tensor) -> None:
    if bool((total.norm(dim=1) > longest).any()):
        raise PayloadError("sum: longer than so many unit vectors can make it")


def _require_positive(within: Tensor, least: float) -> None:
    if float(torch.linalg.eigvalsh(within)[0]) < least:
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
    """Return numbers of examples to divide by: as they are, also below 1, as those of a client are
    whose weight is capped; 1 where there are none."""
    return torch.where(count > 0, count, 1.0)


def with_scatter(sums: Tensors) -> Tensors:
    """Return the sums as they are rounded. Class sums are less their label's part of the sum over
    all labels, which is exact: embeddings point nearly one way, and what they have in common would
    be most of what is rounded. The upper triangle of the scatter within classes is in the place of
    that of the Gram matrix: then an error of a class sum leaves the covariance alone."""
    count, total = sums[COUNT], sums[SUM]
    within = scatter(count, total, symmetric(sums[GRAM], total.shape[1]))
    whole = total.sum(dim=0)
    beside = total - _shares(count)[:, None] * whole
    return {COUNT: count, WHOLE: whole, SUM: beside, SCATTER: triangle(within)}


def _shares(count: Tensor) -> Tensor:
    return count / count.sum().clamp(min=1.0)


def _class_sums(sent: Tensors) -> Tensor:
    """Return the class sums, ``(labels, size)``, of what has arrived."""
    return sent[SUM] + _shares(sent[COUNT])[:, None] * sent[WHOLE]


def with_gram(sent: Tensors) -> Tensors:
    """Undo :func:`with_scatter`, with the class sums that have arrived."""
    count, total = sent[COUNT], _class_sums(sent)
    nothing = torch.zeros(total.shape[1], total.shape[1], dtype=total.dtype)
    between = -scatter(count, total, nothing)
    # Else one client's could take away from what others have sent.
    within = triangle(without_negative(symmetric(sent[SCATTER], total.shape[1])))
    return {COUNT: count, SUM: total, GRAM: within + triangle(between)}


def without_negative(matrix: Tensor) -> Tensor:
    """Return a symmetric matrix with its negative eigenvalues set to 0, which rounded sums may
    have; the very matrix where none is below rounding, as of exact sums."""
    room = 2 * ROUNDING * torch.eye(len(matrix), dtype=matrix.dtype)
    if int(torch.linalg.cholesky_ex(matrix + room).info) == 0:
        return matrix
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0.0)) @ vectors.T


def check_rounded(sent: Tensors) -> None:
    """Check that unit vectors can have sums which are rounded to these: (M50) of docs/method.md.

    Raises:
        PayloadError: as :func:`check`, with room for the codes' error and no more.
    """
    count, total, n = sent[COUNT], _class_sums(sent), require_counts(sent[COUNT])
    within = symmetric(sent[SCATTER], total.shape[1])
    lengths, of_each = total.norm(dim=1), count.clamp(min=1.0)
    off = math.sqrt(total.shape[1]) * sent[SUM].abs().amax(dim=1) / (2 * LEVELS)
    _require_short(total, count * (1 + TOLERANCE) + off)
    trace = float(within.trace() + (lengths.square() / of_each).sum())
    room = float((off * (2 * lengths + off) / of_each).sum())
    if abs(trace - n) > TOLERANCE * n + room:
        raise PayloadError("scatter: with the sums its trace is not the number of examples")
    _require_positive(within, -ROUNDING * n - float(within.trace()) / (2 * LEVELS))


def rounded_shapes(labels: int, size: int) -> Mapping[str, tuple[int, ...]]:
    """Name to shape of what is rounded: see :func:`with_scatter`."""
    own = shapes(labels, size)
    return {COUNT: own[COUNT], WHOLE: (size,), SUM: own[SUM], SCATTER: own[GRAM]}


ROUNDED = SumsOnWire(
    rounded_shapes, {SUM: ROWS, SCATTER: CORRELATIONS}, with_scatter, check_rounded, with_gram
)
"""How they travel at int8: a quarter of the bytes; counts are exact."""
