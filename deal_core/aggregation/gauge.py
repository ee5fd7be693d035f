"""The error gauge: how far an aggregate is from the ideal ``sum_i p_i s_i B_i A_i``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deal_core.adapters import Adapter, LoraFactors, Shapes

EXACT_ROWS = 512
EXACT_CLIENTS = 64
SKETCH_COLUMNS = 32


@dataclass(frozen=True)
class Reading:
    """Relative Frobenius error over all layers, the norm of the ideal, and how it was found."""

    error: float
    ideal_norm: float
    estimated: bool


class ErrorGauge:
    """Watches the updates of a round go by and measures the result against their ideal sum.

    **Exact** while the ranks of all clients together stay within ``rows`` (512) and there are
    at most ``clients`` (64): the factors are kept by reference and the norm of
    ``[B_result, -c_1 B_1, ...] [A_result; A_1; ...]`` follows from two QRs.

    **Estimated** beyond that, in constant memory: the updates are folded into the running
    sketch ``Y = sum_i w_i s_i B_i (A_i G)`` with a Gaussian ``G`` (``d_in x 32``, entries of
    variance 1/32, fixed generator), and ``||(result - ideal) G||^2`` is an unbiased estimate
    of the squared norm. Over ``L`` layers its relative standard deviation is at most
    ``sqrt(2 / 32) = 25 %`` (everything in one direction of one layer), that of the norm half
    of it, and in practice ``1/sqrt(L)`` of that. Updates are folded 64 at a time so that the
    cost is a few large matrix products. ``G`` is public: a gauge, not a defence.
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
        self._sketch: dict[str, Tensor] = {}
        self._tests: dict[int, Tensor] = {}

    def add(self, adapter: Adapter, weight: float) -> None:
        """Note one update of the ideal sum."""
        rows, clients = self._limits
        if self._kept and (self._rows + adapter.rank > rows or len(self._kept) >= clients):
            self._fold()
        self._kept.append((weight, adapter))
        self._rows += adapter.rank
        self._weight += weight

    def read(self, *result: Adapter | None) -> Reading:
        """Return the error of the sum of the given adapters (None is skipped; at least one).

        0 when both the result and the ideal are zero; infinite when only the ideal is.

        Raises:
            ValueError: no update was added.
        """
        if self._weight == 0.0:
            raise ValueError("no client update to aggregate")
        given = [(adapter.scaling, adapter) for adapter in result if adapter is not None]
        gap, size = self._sketched(given) if self._sketch else self._exact(given)
        return Reading(_ratio(gap, size), math.sqrt(size), bool(self._sketch))

    def _shares(self) -> list[tuple[float, Adapter]]:
        return [(weight * each.scaling / self._weight, each) for weight, each in self._kept]

    def _exact(self, result: Sequence[tuple[float, Adapter]]) -> tuple[float, float]:
        ideal = self._shares()
        negated = [(-share, adapter) for share, adapter in ideal]
        gap = sum(square_norm(_stacked(name, [*result, *negated])) for name in self._shapes)
        size = sum(square_norm(_stacked(name, ideal)) for name in self._shapes)
        return gap, size

    def _sketched(self, result: Sequence[tuple[float, Adapter]]) -> tuple[float, float]:
        self._fold()
        gap = size = 0.0
        for name, total in self._sketch.items():
            ideal = total / self._weight
            gap += float((self._seen(name, result, torch.float64) - ideal).square().sum())
            size += float(ideal.square().sum())
        return gap, size

    def _fold(self) -> None:
        weighted = [(weight * each.scaling, each) for weight, each in self._kept]
        for name in self._shapes if weighted else ():
            seen = self._seen(name, weighted, torch.float32).double()
            self._sketch[name] = self._sketch[name] + seen if name in self._sketch else seen
        self._kept, self._rows = [], 0

    def _seen(
        self, name: str, parts: Sequence[tuple[float, Adapter]], dtype: torch.dtype
    ) -> Tensor:
        """Return ``sum c B (A G)``, shape ``(d_out, 32)``."""
        factors = _stacked(name, parts, dtype)
        return factors.B @ (factors.A @ self._test(factors.A.shape[1]).to(dtype))

    def _test(self, d_in: int) -> Tensor:
        if d_in not in self._tests:
            generator = torch.Generator().manual_seed(d_in)
            draw = torch.randn(d_in, SKETCH_COLUMNS, generator=generator)
            self._tests[d_in] = draw / math.sqrt(SKETCH_COLUMNS)
        return self._tests[d_in]


def _stacked(
    name: str, parts: Sequence[tuple[float, Adapter]], dtype: torch.dtype = torch.float64
) -> LoraFactors:
    """Return factors of ``sum c B A``; the coefficient multiplies the smaller copy, ``A``."""
    return LoraFactors(
        torch.cat([share * each.layers[name].A.to(dtype) for share, each in parts]),
        torch.cat([each.layers[name].B.to(dtype) for _, each in parts], dim=1),
    )


def square_norm(factors: LoraFactors) -> float:
    """Return ``||B A||_F^2`` through the triangles of two QRs."""
    left = torch.linalg.qr(factors.B, mode="r").R
    right = torch.linalg.qr(factors.A.T, mode="r").R
    return float((left @ right.T).square().sum())


def _ratio(gap: float, size: float) -> float:
    if size == 0.0:
        return 0.0 if gap == 0.0 else math.inf
    return math.sqrt(gap / size)
