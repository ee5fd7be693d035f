"""Class sums of a site's records, clipped and with this site's share of the noise, in whole
numbers: what a secure sum adds up over sites.

A record adds its vector, at most 1 long, to the sum of its label, a fixed weight to the count of
it, and the outer product of the vector's first entries to a Gram matrix of all labels. All that
together is at most as long as :class:`~deal_core.wire.class_sums.SumShape` says, and is scaled to
the bound; a group adds the mean over its records. Source: docs/method.md, (M58), (M62), (M67).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from deal_core.privacy.mechanisms.groups import Groups
from deal_core.wire.class_sums import COUNT_WEIGHT, SumShape

RECORDS_AT_ONCE = 256
"""Parts of so many records are in memory together."""


def clipped_class_sums(
    vectors: Tensor,
    targets: Tensor,
    shape: SumShape,
    batch: Sequence[int],
    groups: Groups | None,
    bound: float,
    step: float,
) -> Tensor:
    """Return the sum over a batch of what each record, or group, adds: ``(shape.entries,)``, in
    steps of a grid, int64.

    Args:
        vectors: of all records, ``(records, size)``; longer than 1: shortened; not finite: zeros.
        targets: labels, ``(records,)``.
        shape: what is added up.
        batch: positions of the records that are in the sum; a group's all or none.
        groups: of all records; None: each by itself.
        bound: length of a record's, or group's, part at most, before it is rounded.
        step: of the grid.
    """
    total = torch.zeros(shape.entries, dtype=torch.int64)
    for places in _units(batch, groups):
        parts = _parts(vectors[places], targets[places], shape) * (bound / shape.length)
        if groups is not None:
            parts = parts.mean(dim=0, keepdim=True)
        total += (parts / step).round().to(torch.int64).sum(dim=0)
    return total


def _units(batch: Sequence[int], groups: Groups | None) -> Iterator[Tensor]:
    """Yield positions: of a group at a time, or of so many records."""
    places = torch.tensor(list(batch), dtype=torch.long)
    if groups is None:
        yield from torch.split(places, RECORDS_AT_ONCE)
        return
    numbers = torch.tensor([groups.numbers[place] for place in batch], dtype=torch.long)
    for number in sorted(set(numbers.tolist())):
        yield places[numbers == number]


def _parts(vectors: Tensor, targets: Tensor, shape: SumShape) -> Tensor:
    """Return what each record adds, ``(records, entries)``, float64."""
    x = vectors.double()
    x = torch.where(x.isfinite().all(dim=1, keepdim=True), x, 0.0)
    x = x / x.norm(dim=1, keepdim=True).clamp(min=1.0)
    rows = torch.zeros(len(x), shape.labels, shape.size + 1, dtype=torch.float64)
    counts = torch.full((len(x), 1), COUNT_WEIGHT, dtype=torch.float64)
    rows[torch.arange(len(x)), targets] = torch.cat([x, counts], dim=1)
    if not shape.gram:
        return rows.flatten(1)
    first, second = torch.triu_indices(shape.gram, shape.gram)
    weight = torch.where(first == second, 1.0, math.sqrt(2.0)).double()
    return torch.cat([rows.flatten(1), weight * x[:, first] * x[:, second]], dim=1)
