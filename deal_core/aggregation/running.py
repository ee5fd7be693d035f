"""Running sums over clients: of one factor, of products kept as factors, and of what the
aggregation error follows from."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deal_core.lora.adapter import Adapter, LoraFactors, Shapes, Spectrum, spectrum

NUMERICAL_ZERO = 1e-8
"""Singular values below this share of the summed norms are rounding of float32 inputs."""


class FactorMean:
    """Weighted mean of a list of tensors, in float64 and in constant memory.

    Holds ``sum_i w_i X_i`` and ``sum_i w_i``: twice the bytes of one client's float32 tensors,
    however many clients there are.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._shapes: list[torch.Size] = []
        self._weight = 0.0

    def add(self, tensors: Sequence[Tensor], weight: float) -> None:
        """Add ``weight * X`` to the sums, in place; same shapes each time."""
        vector = one_vector(tensors)
        if self._sum is None:
            self._shapes = [tensor.shape for tensor in tensors]
            self._sum = vector.double() * weight
        else:
            self._sum.add_(vector, alpha=weight)
        self._weight += weight

    def mean(self) -> list[Tensor]:
        """Return the float64 means, in the order of the tensors.

        Raises:
            ValueError: nothing was added.
        """
        if self._sum is None:
            raise ValueError("no client update to aggregate")
        parts = torch.split(self._sum / self._weight, [shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]


def one_vector(tensors: Sequence[Tensor]) -> Tensor:
    """Return the tensors one after the other.

    A view where they lie so in one piece of memory already, as those that
    :func:`~deal_core.wire.tensors.unpack` decodes: one pass over it costs half of
    many small ones. Otherwise a copy.
    """
    first = tensors[0]
    start = end = first.data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != end or not tensor.is_contiguous():
            return torch.cat([each.reshape(-1) for each in tensors])
        end += tensor.nbytes
    room = first.untyped_storage().nbytes() - first.storage_offset() * first.element_size()
    if end - start > room:
        return torch.cat([each.reshape(-1) for each in tensors])
    return first.as_strided(((end - start) // first.element_size(),), (1,))


class ProductSum:
    """``sum_i c_i B_i A_i`` of every layer, kept as factors.

    Products wait as they came, without a copy, until their ranks add up to twice the smaller
    side of the layer; then a QR of the stack of that side folds them into one exact pair
    whose rank is at most that side. Memory is therefore bounded whatever the number of
    clients: ``2 min(d_out, d_in) (d_out + d_in)`` numbers a layer, and ``sum_i r_i`` rows
    while that is less. Past ``min(d_out, d_in)`` rows the sum has full rank, and nothing
    smaller than a full-rank pair is exact.
    """

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = dict(shapes)
        self._waiting: dict[str, list[tuple[float, LoraFactors]]] = {name: [] for name in shapes}
        self._rows = dict.fromkeys(shapes, 0)
        self._scale = dict.fromkeys(shapes, 0.0)

    def add(self, layers: Mapping[str, LoraFactors], coefficient: float) -> None:
        """Add ``coefficient * B @ A`` to the sum of every layer, or of none where this raises."""
        sizes = {
            name: float(torch.linalg.norm(f.B)) * float(torch.linalg.norm(f.A))
            for name, f in layers.items()
        }
        full = {
            name: fold(joined([*self._waiting[name], (coefficient, factors)]))
            for name, factors in layers.items()
            if self._rows[name] + factors.A.shape[0] > 2 * min(self._shapes[name])
        }
        for name, factors in layers.items():
            self._scale[name] += abs(coefficient) * sizes[name]
            if name in full:
                self._waiting[name] = [(1.0, full[name])]
                self._rows[name] = full[name].A.shape[0]
            else:
                self._waiting[name].append((coefficient, factors))
                self._rows[name] += factors.A.shape[0]

    def spectrum(self, name: str, total_weight: float) -> Spectrum:
        """Return the thin SVD of ``sum / total_weight`` down to its numerical rank."""
        parts = spectrum(joined(self._waiting[name]), 1.0 / total_weight)
        floor = NUMERICAL_ZERO * self._scale[name] / total_weight
        return head(parts, int(parts.S.gt(floor).sum()))


def joined(products: Sequence[tuple[float, LoraFactors]]) -> LoraFactors:
    """Return float64 factors of ``sum c B A``: ``[c_1 B_1, c_2 B_2, ...] [A_1; A_2; ...]``."""
    return LoraFactors(
        torch.cat([factors.A.double() for _, factors in products]),
        torch.cat([coefficient * factors.B.double() for coefficient, factors in products], dim=1),
    )


def fold(factors: LoraFactors) -> LoraFactors:
    """Return the same product with rank at most ``min(d_out, d_in)``: one QR, no SVD."""
    if factors.B.shape[0] <= factors.A.shape[1]:
        basis, core = torch.linalg.qr(factors.B)
        return LoraFactors(core @ factors.A, basis)
    basis, core = torch.linalg.qr(factors.A.T)
    return LoraFactors(basis.T, factors.B @ core.T)


def head(parts: Spectrum, rank: int) -> Spectrum:
    """Return the leading ``rank`` directions."""
    return Spectrum(parts.U[:, :rank], parts.S[:rank], parts.Vh[:rank])


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
        missing = [*given, *((-share, each) for share, each in ideal)]
        gap, size = (
            sum(
                square_norm(joined([(share, each.layers[name]) for share, each in parts]))
                for name in self._shapes
            )
            for parts in (missing, ideal)
        )
        if size == 0.0:
            return 0.0 if gap == 0.0 else math.inf
        return math.sqrt(gap / size)


def square_norm(factors: LoraFactors) -> float:
    """Return ``||B A||_F^2`` through the triangles of two QRs."""
    left = torch.linalg.qr(factors.B, mode="r").R
    right = torch.linalg.qr(factors.A.T, mode="r").R
    return float((left @ right.T).square().sum())
