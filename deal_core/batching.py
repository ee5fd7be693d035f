"""Batches of similar length: less padding, same examples. A batch is a list of positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deal_core.models.interface import Encoded

WINDOW = 32
"""Batches that are sorted by length together: wide enough to save padding, narrow enough
to keep batches random."""
EVALUATION_TOKENS = 4096
"""Without gradients no activations are kept, so a pass may be larger."""


def training_batches(
    data: Sequence[Encoded], batch_size: int, generator: torch.Generator
) -> list[list[int]]:
    """Return one epoch: every example once, shuffled, in batches of similar length."""
    order = torch.randperm(len(data), generator=generator).tolist()
    window = WINDOW * batch_size
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        part = sorted(order[start : start + window], key=lambda i: len(data[i].tokens))
        batches.extend(part[i : i + batch_size] for i in range(0, len(part), batch_size))
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    return [batches[i] for i in shuffled]


def evaluation_batches(data: Sequence[Encoded]) -> list[list[int]]:
    """Return every example once, sorted by length, in passes of equal cost."""
    ordered = sorted(range(len(data)), key=lambda i: len(data[i].tokens))
    return within_budget(data, ordered, EVALUATION_TOKENS)


def within_budget(data: Sequence[Encoded], batch: Sequence[int], tokens: int) -> list[list[int]]:
    """Cut a batch into passes of at most ``tokens`` tokens, padding included, at least one
    example each; in the order given."""
    passes: list[list[int]] = []
    longest = 0
    for position in batch:
        longest = max(longest, len(data[position].tokens))
        if passes and (len(passes[-1]) + 1) * longest <= tokens:
            passes[-1].append(position)
        else:
            passes.append([position])
            longest = len(data[position].tokens)
    return passes
