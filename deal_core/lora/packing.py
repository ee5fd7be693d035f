"""Texts of different lengths end to end in one row, so that nothing is computed for padding.

What works token by token does not notice. What does not, attention and gradients of single texts,
asks for the texts one below the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

WORTH = 1.1
"""Padded tokens over real ones from which on packing is the faster (measured)."""


@dataclass(frozen=True)
class Packing:
    """Attributes: ``lengths`` of the texts, in tokens, in their order; none is 0."""

    lengths: tuple[int, ...]

    @cached_property
    def positions(self) -> Tensor:
        """Place of every token in its text, ``(1, tokens)``."""
        return torch.tensor([list(chain.from_iterable(map(range, self.lengths)))])

    @cached_property
    def real(self) -> Tensor:
        """Which cells hold a token, ``(texts, longest)``."""
        return torch.arange(max(self.lengths))[None, :] < torch.tensor(self.lengths)[:, None]

    @cached_property
    def groups(self) -> tuple[Packing, ...]:
        """Neighbours of about one length together: what must be padded is padded little."""
        groups: list[list[int]] = []
        for length in self.lengths:
            both = [*groups[-1], length] if groups else []
            if both and _alike(both):
                groups[-1] = both
            else:
                groups.append([length])
        return tuple(Packing(tuple(group)) for group in groups)

    @cached_property
    def _cells(self) -> Tensor:
        return self.real.flatten().nonzero().flatten()

    def apart(self, row: Tensor) -> Tensor:
        """``(tokens, d)`` to ``(texts, longest, d)``; zero where there is no token."""
        texts, longest = self.real.shape
        cells = row.new_zeros(texts * longest, row.shape[1])
        return cells.index_copy(0, self._cells.to(row.device), row).view(texts, longest, -1)

    def together(self, cells: Tensor) -> Tensor:
        """Undo :meth:`apart`; what lies in cells without a token is dropped."""
        return cells.flatten(0, 1).index_select(0, self._cells.to(cells.device))


def packing_of(token_ids: Sequence[Sequence[int]]) -> Packing | None:
    """How to pack these texts; None: padding is as good."""
    lengths = tuple(len(ids) for ids in token_ids)
    return None if _alike(lengths) else Packing(lengths)


def _alike(lengths: Sequence[int]) -> bool:
    """Are the lengths so close that padding to the longest costs less than packing?"""
    return len(lengths) * max(lengths) <= WORTH * sum(lengths)


def packs(module: nn.Module) -> bool:
    """Return whether the model packs: a BERT, which takes positions, on a processor, with our
    attention (:mod:`deal_core.models.fast.attention`)."""
    return bool(module.__dict__.get("packs_texts", False))


@contextmanager
def packed(layers: Iterable[Any], packing: Packing) -> Iterator[None]:
    """Within the block these adapted layers know which tokens are one text's."""
    layers = list(layers)
    for layer in layers:
        layer.packing = packing
    try:
        yield
    finally:
        for layer in layers:
            layer.packing = None
