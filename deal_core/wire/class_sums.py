"""Layout of class sums: counts, sums of vectors and a Gram matrix of a task in one row of numbers.

Source: docs/method.md, (M62), (M67).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

COUNT_WEIGHT = 0.25
"""What a record adds to its label's count, in lengths of a vector: a vector is long, and a count
needs to be known less well than a sum."""
GRAM_DIRECTIONS = 64
"""First entries of a vector whose outer product is added up; those beyond have one variance."""


@dataclass(frozen=True)
class SumShape:
    """What is added up for a task: its ``labels``, the ``size`` of a vector, and how many ``gram``
    entries of one have an outer product (0: none)."""

    labels: int
    size: int
    gram: int = 0

    @property
    def entries(self) -> int:
        """Numbers in all: of each label a sum and a count, then the triangle."""
        return self.labels * (self.size + 1) + self.gram * (self.gram + 1) // 2

    def split(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return counts ``(labels,)``, sums ``(labels, size)``, and the Gram matrix or None, of
        ``(entries,)`` added parts of length :attr:`length`."""
        rows = values[: self.labels * (self.size + 1)].reshape(self.labels, self.size + 1)
        if not self.gram:
            return rows[:, -1] / COUNT_WEIGHT, rows[:, :-1], None
        matrix = torch.zeros(self.gram, self.gram, dtype=values.dtype)
        first, second = torch.triu_indices(self.gram, self.gram)
        triangle = values[self.labels * (self.size + 1) :]
        matrix[first, second] = triangle / torch.where(first == second, 1.0, math.sqrt(2.0))
        matrix[second, first] = matrix[first, second]
        return rows[:, -1] / COUNT_WEIGHT, rows[:, :-1], matrix

    @property
    def length(self) -> float:
        """Largest length of what one record adds."""
        return math.sqrt(1.0 + COUNT_WEIGHT**2 + (1.0 if self.gram else 0.0))
