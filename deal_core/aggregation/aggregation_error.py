"""The aggregation error: how far an aggregate is from the ideal ``sum_i p_i s_i B_i A_i``.

Source: docs/method.md (M23), (M24).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deal_core.aggregation.running import joined
from deal_core.lora.adapter import Adapter, LoraFactors, Shapes

EXACT_ROWS = 512
EXACT_CLIENTS = 64
COLUMNS = 16
CARRY_EVERY = 64


@dataclass(frozen=True)
class AggregationError:
    """Relative Frobenius error over all layers, the norm of the ideal, and how it was found."""

    error: float
    ideal_norm: float
    estimated: bool


class ErrorMeter:
    """Watches the updates of a round go by and measures the result against their ideal sum.

    **Exact** while the ranks of all clients together stay within ``rows`` (512) and there are
    at most ``clients`` (64): the factors are kept by reference and the norm of
    ``[B_result, -c_1 B_1, ...] [A_result; A_1; ...]`` follows from two QRs.

    **Estimated** beyond that, in constant memory, from the running
    :class:`Sketch` ``Y = sum_i w_i s_i B_i (A_i G)``: ``||(result - ideal) G||^2`` is an unbiased
    estimate of the squared norm. Over ``L`` layers its relative standard deviation is at most
    ``sqrt(2 / 16) = 35 %`` (everything in one direction of one layer), that of the norm half
    of it, and in practice ``1/sqrt(L)`` of that. ``G`` is public: it measures, and defends nothing.
    Source: Halko, Martinsson, Tropp, SIAM Review 2011, section 4.3.

    Args:
        shapes: layer name to ``(d_out, d_in)``.
        rows: largest sum of ranks that is kept.
        clients: largest number of updates that is kept.
    """

    def __init__(
        self, shapes: Shapes, rows: int = EXACT_ROWS, clients: int = EXACT_CLIENTS
    ) -> None:
        self._shapes = dict(shapes)
        self._limits = rows, clients
        self._kept: list[tuple[float, Adapter]] = []
        self._rows = 0
        self._weight = 0.0
        self._sketch: Sketch | None = None

    def add(self, adapter: Adapter, weight: float) -> None:
        """Note one update of the ideal sum."""
        self._rows += adapter.rank
        self._weight += weight
        self._kept.append((weight * adapter.scaling, adapter))
        rows, clients = self._limits
        if self._sketch is None and (self._rows > rows or len(self._kept) > clients):
            self._sketch = Sketch(self._shapes)
        if self._sketch is not None:
            for coefficient, each in self._kept:
                self._sketch.add(each, coefficient)
            self._kept = []

    def read(self, *result: Adapter | None) -> AggregationError:
        """Return the error of the sum of the given adapters (None is skipped; at least one).

        0 when both the result and the ideal are zero; infinite when only the ideal is.

        Raises:
            ValueError: no update was added.
        """
        if self._weight == 0.0:
            raise ValueError("no client update to aggregate")
        given = [(adapter.scaling, adapter) for adapter in result if adapter is not None]
        if self._sketch is None:
            gap, size = self._exact(given)
        else:
            gap, size = self._sketch.squares(given, self._weight)
        return AggregationError(_ratio(gap, size), math.sqrt(size), self._sketch is not None)

    def _exact(self, result: Sequence[tuple[float, Adapter]]) -> tuple[float, float]:
        ideal = [(coefficient / self._weight, each) for coefficient, each in self._kept]
        negated = [(-share, each) for share, each in ideal]
        gap = sum(square_norm(_stacked(name, [*result, *negated])) for name in self._shapes)
        size = sum(square_norm(_stacked(name, ideal)) for name in self._shapes)
        return gap, size


class Sketch:
    """``Y = sum_i c_i B_i (A_i G)`` of every layer, ``G`` Gaussian with a fixed generator.

    ``G`` is ``(d_in, 16)`` with entries of variance 1/16, so ``E ||M G||^2 = ||M||^2``. Sums run
    in float32 and are carried over to float64 every 64 updates. Small products one by one
    beat a few large ones here: nothing is copied, and nothing waits for another thread.
    """

    def __init__(self, shapes: Shapes) -> None:
        self._tests = {d_in: _test_matrix(d_in) for d_in in {shape[1] for shape in shapes.values()}}
        self._recent = {n: torch.zeros(d_out, COLUMNS) for n, (d_out, _) in shapes.items()}
        self._total = {n: torch.zeros_like(y, dtype=torch.float64) for n, y in self._recent.items()}
        self._waiting = 0

    def add(self, adapter: Adapter, coefficient: float) -> None:
        """Add one product to every layer's sum."""
        for name, factors in adapter.layers.items():
            seen = factors.A @ self._tests[factors.A.shape[1]]
            self._recent[name].addmm_(factors.B, seen, alpha=coefficient)
        self._waiting += 1
        if self._waiting >= CARRY_EVERY:
            self._carry()

    def squares(
        self, result: Sequence[tuple[float, Adapter]], weight: float
    ) -> tuple[float, float]:
        """Return estimates of ``||sum c B A - Y / weight||^2`` and ``||Y / weight||^2``."""
        self._carry()
        gap = size = 0.0
        for name, total in self._total.items():
            factors, ideal = _stacked(name, result), total / weight
            test = self._tests[factors.A.shape[1]].double()
            gap += float((factors.B @ (factors.A @ test) - ideal).square().sum())
            size += float(ideal.square().sum())
        return gap, size

    def _carry(self) -> None:
        for name, recent in self._recent.items():
            self._total[name] += recent
            recent.zero_()
        self._waiting = 0


def _test_matrix(d_in: int) -> Tensor:
    generator = torch.Generator().manual_seed(d_in)
    return torch.randn(d_in, COLUMNS, generator=generator) / math.sqrt(COLUMNS)


def square_norm(factors: LoraFactors) -> float:
    """Return ``||B A||_F^2`` through the triangles of two QRs."""
    left = torch.linalg.qr(factors.B, mode="r").R
    right = torch.linalg.qr(factors.A.T, mode="r").R
    return float((left @ right.T).square().sum())


def _stacked(name: str, parts: Sequence[tuple[float, Adapter]]) -> LoraFactors:
    return joined([(share, each.layers[name]) for share, each in parts])


def _ratio(gap: float, size: float) -> float:
    if size == 0.0:
        return 0.0 if gap == 0.0 else math.inf
    return math.sqrt(gap / size)
