"""A sum of clipped gradients in whole numbers: what a record adds follows from that record alone.

In floating point a sum depends on its order and on all that is in it, so that one record more can
move it by several times its own gradient. Here each gradient is clipped over all that is released
together, and rounded to a grid; whole numbers add up exactly, in every order. Source:
docs/method.md (M66).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Gradient = Mapping[str, Tensor]
"""Name of what learns to its gradient; a name may be missing: zero."""


@dataclass
class ClippedSum:
    """The sum so far.

    Attributes:
        bound: to what each gradient is clipped, over all its tensors together, before it is
            rounded.
        step: distance of neighbours on the grid.
        total: name to the sum, in steps of the grid, int64.
        norms: of the gradients before clipping; NaN: there was none. Private: for tests, and tuning
            on public data, alone.
    """

    bound: float
    step: float
    total: dict[str, Tensor] = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)

    def add(self, gradient: Gradient) -> None:
        """Add one gradient, clipped and rounded; one that is not finite, or missing, adds
        nothing."""
        exact = {name: values.detach().double() for name, values in gradient.items()}
        norm = math.sqrt(math.fsum(float(values.square().sum()) for values in exact.values()))
        self.norms.append(norm if exact else math.nan)
        if not exact or not math.isfinite(norm):
            return
        shortened = self.bound / norm if norm > self.bound else 1.0
        for name, values in exact.items():
            whole = (values * shortened / self.step).round().to(torch.int64)
            self.total[name] = self.total[name] + whole if name in self.total else whole
