"""Batches of similar length: less padding, same examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

from deal_core.models.interface import Encoded

WINDOW = 32
"""Batches that are sorted by length together: wide enough to save padding, narrow enough
to keep batches random."""

T = TypeVar("T", bound=Encoded)


def training_batches(
    data: Sequence[T], batch_size: int, generator: torch.Generator
) -> list[list[T]]:
    """Return one epoch: every example once, shuffled, in batches of similar length."""
    order = torch.randperm(len(data), generator=generator).tolist()
    window = WINDOW * batch_size
    batches: list[list[T]] = []
    for start in range(0, len(order), window):
        part = sorted((data[i] for i in order[start : start + window]), key=_length)
        batches.extend(part[i : i + batch_size] for i in range(0, len(part), batch_size))
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    return [batches[i] for i in shuffled]


def evaluation_batches(data: Sequence[T], batch_size: int) -> list[list[T]]:
    """Return every example once, sorted by length."""
    ordered = sorted(data, key=_length)
    return [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]


def _length(item: Encoded) -> int:
    return len(item.tokens)
