"""The aggregation error: how far an aggregate is from the ideal ``sum_i p_i s_i B_i A_i``.

Source: docs/method.md (M23), (M24).
"""

from __future__ import annotations

import math

import torch

from deal_core.aggregation.running import joined
from deal_core.lora.adapter import Adapter, LoraFactors, Shapes

MOST_ROWS = 512
MOST_CLIENTS = 64


class ErrorMeter:
    """Watches the updates of a round go by and measures the result against their ideal sum.

    While the ranks of all clients together stay within 512, and there are at most 64, their factors
    are kept by reference, and the norm of ``[B_result, -c_1 B_1, ...] [A_result; A_1; ...]``
    follows from two QRs; beyond, memory would grow with the clients, and the error is not known.
    """

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = dict(shapes)
        self._kept: list[tuple[float, Adapter]] | None = []
        self._rows = 0
        self._weight = 0.0

    def add(self, adapter: Adapter, weight: float) -> None:
        """Note one update of the ideal sum."""
        self._rows += adapter.rank
        self._weight += weight
        if self._kept is not None:
            self._kept.append((weight * adapter.scaling, adapter))
            if self._rows > MOST_ROWS or len(self._kept) > MOST_CLIENTS:
                self._kept = None

    def read(self, *result: Adapter | None) -> float | None:
        """Return the error of the sum of the given adapters (None is skipped; at least one); None:
        not known.

        0 when both the result and the ideal are zero; infinite when only the ideal is.

        Raises:
            ValueError: no update was added.
        """
        if self._weight == 0.0:
            raise ValueError("no client update to aggregate")
        if self._kept is None:
            return None
        given = [(each.scaling, each) for each in result if each is not None]
        ideal = [(coefficient / self._weight, each) for coefficient, each in self._kept]
        gap = self._square([*given, *((-share, each) for share, each in ideal)])
        size = self._square(ideal)
        if size == 0.0:
            return 0.0 if gap == 0.0 else math.inf
        return math.sqrt(gap / size)

    def _square(self, parts: list[tuple[float, Adapter]]) -> float:
        """Return the squared norm of a sum of updates over all layers."""
        return sum(
            square_norm(joined([(share, each.layers[name]) for share, each in parts]))
            for name in self._shapes
        )


def square_norm(factors: LoraFactors) -> float:
    """Return ``||B A||_F^2`` through the triangles of two QRs."""
    left = torch.linalg.qr(factors.B, mode="r").R
    right = torch.linalg.qr(factors.A.T, mode="r").R
    return float((left @ right.T).square().sum())
