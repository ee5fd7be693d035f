"""Class sums of a site's records, clipped and with this site's share of the noise, in whole
numbers: what a secure sum adds up over sites.

A record adds its embedding to the sum of its label, and :data:`COUNT_WEIGHT` to the count of it. So
it changes one row, by the length of the two together, which is clipped as a gradient is; a group
changes it by the clipped mean over its records. Source: docs/method.md, (M58), (M62).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deal_core.privacy.mechanisms.groups import Groups

COUNT_WEIGHT = 0.25
"""What a record adds to its label's count, in lengths of an embedding: an embedding is long, and a
count needs to be known less well than a sum."""


def clipped_class_sums(
    embeddings: Tensor,
    targets: Tensor,
    labels: int,
    batch: Sequence[int],
    groups: Groups | None,
    bound: float,
    step: float,
) -> Tensor:
    """Return the sum over a batch of what each record, or group, adds: ``(labels, size + 1)``, in
    steps of a grid, int64; the last column counts.

    Args:
        embeddings: of all records, ``(records, size)``.
        targets: labels, ``(records,)``.
        labels: how many there are.
        batch: positions of the records that are in the sum; a group's all or none.
        groups: of all records; None: each by itself.
        bound: to what a record's, or group's, part is clipped before it is rounded.
        step: of the grid.
    """
    places = torch.tensor(list(batch), dtype=torch.long)
    vectors = embeddings[places].double()
    counts = torch.full((len(places), 1), COUNT_WEIGHT, dtype=torch.float64)
    vectors, rows = torch.cat([vectors, counts], dim=1), targets[places]
    total = torch.zeros(labels, embeddings.shape[1] + 1, dtype=torch.int64)
    if groups is None:
        return total.index_add_(0, rows, _clipped(vectors, bound, step))
    numbers = torch.tensor([groups.numbers[place] for place in batch], dtype=torch.long)
    for number in sorted(set(numbers.tolist())):
        own = numbers == number
        one = torch.zeros(total.shape, dtype=torch.float64)
        one = one.index_add_(0, rows[own], vectors[own]) / int(own.sum())
        total += _clipped(one.reshape(1, -1), bound, step).reshape(total.shape)
    return total


def _clipped(vectors: Tensor, bound: float, step: float) -> Tensor:
    """Return the rows, each at most ``bound`` long, in steps of the grid, int64; one that is not
    finite as zeros."""
    vectors = torch.where(vectors.isfinite().all(dim=1, keepdim=True), vectors, 0.0)
    lengths = vectors.norm(dim=1, keepdim=True)
    return (vectors * (bound / lengths.clamp(min=bound)) / step).round().to(torch.int64)
