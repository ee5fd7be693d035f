"""LoRA adapters as plain tensors: the only thing that is learnt and the only thing that travels.

Notation (PEFT's): an adapted linear layer has ``lora_A`` of shape ``(r, d_in)`` and
``lora_B`` of shape ``(d_out, r)``; the update of its weight is ``scaling * lora_B @ lora_A``.
All operations here work on the factors; no ``d_out x d_in`` matrix is ever formed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deal_core.errors import UserError

Shapes = Mapping[str, tuple[int, int]]
"""Layer name to ``(d_out, d_in)``."""


@dataclass(frozen=True)
class LoraFactors:
    """Both factors of one layer.

    Attributes:
        A: ``lora_A``, shape ``(r, d_in)``, float32.
        B: ``lora_B``, shape ``(d_out, r)``, float32.
    """

    A: Tensor
    B: Tensor


@dataclass(frozen=True)
class Adapter:
    """One adapter over all adapted layers of a model.

    Attributes:
        layers: layer name (as in the base model) to its factors; never empty.
        scaling: multiplier ``s`` of ``B @ A`` (``lora_alpha / r`` for the current
            adapter, 1 for the retained one).
    """

    layers: Mapping[str, LoraFactors]
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        """Rank of the first layer (all layers of one adapter share it)."""
        return next(iter(self.layers.values())).A.shape[0]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Layer name to ``(d_out, d_in)``."""
        return {name: (f.B.shape[0], f.A.shape[1]) for name, f in self.layers.items()}


def zero_adapter(shapes: Shapes, rank: int, scaling: float = 1.0) -> Adapter:
    """Return the adapter that changes nothing: both factors zero."""
    return Adapter(
        {
            name: LoraFactors(torch.zeros(rank, d_in), torch.zeros(d_out, rank))
            for name, (d_out, d_in) in shapes.items()
        },
        scaling,
    )


def orthogonal_init(
    retained: Adapter, rank: int, scaling: float, generator: torch.Generator
) -> Adapter:
    """Return a new current adapter that starts outside what is retained.

    ``B = 0``; the rows of ``A`` are orthonormal, lie in the orthogonal complement of the
    row space of the retained ``A``, and are scaled to the expected norm ``1/sqrt(3)`` of a
    row under PEFT's Kaiming initialisation. With a retained adapter of zeros this is an
    orthogonal LoRA initialisation. Source: docs/method.md (M4): O-LoRA's
    constraint met at the start, not by a penalty.

    Args:
        retained: all earlier tasks; its rank may be anything, zeros included.
        rank: rank ``r`` of the new adapter.
        scaling: ``lora_alpha / r``.
        generator: the only source of randomness.

    Raises:
        UserError: ``rank`` plus the retained rank exceeds ``d_in`` of a layer.
    """
    return Adapter(
        {
            name: LoraFactors(
                _fresh_rows(factors.A, rank, generator),
                torch.zeros(factors.B.shape[0], rank),
            )
            for name, factors in retained.layers.items()
        },
        scaling,
    )


def _fresh_rows(taken: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    d_in = taken.shape[1]
    basis = row_basis(taken)
    if rank + basis.shape[0] > d_in:
        raise UserError(
            f"no room for {rank} new directions: {basis.shape[0]} of {d_in} inputs are taken; "
            "lower adapter.rank or adapter.retained_rank, or choose a method that keeps less"
        )
    draw = torch.randn(rank, d_in, generator=generator, dtype=torch.float64)
    rows = torch.linalg.qr(outside(draw, basis).T).Q.T
    return rows.float() / math.sqrt(3.0)


def outside(matrix: Tensor, basis: Tensor) -> Tensor:
    """Return the matrix with its rows outside of a space, of which ``basis`` has orthonormal
    rows."""
    for _ in range(2):  # the second pass removes what rounding left of the first
        matrix = matrix - (matrix @ basis.T) @ basis
    return matrix


def row_basis(matrix: Tensor) -> Tensor:
    """Return an orthonormal basis of the row space, float64, ``(numerical rank, columns)``."""
    _, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    if s.numel() == 0 or s[0] == 0:
        return matrix.new_zeros((0, matrix.shape[1]), dtype=torch.float64)
    keep: Tensor = s > s[0] * 1e-6
    return vh[keep]


def stack(adapters: Iterable[Adapter]) -> Adapter:
    """Return one adapter (scaling 1) whose update is the exact sum of the given ones.

    The rank is the sum of the ranks: ``[s1 B1, s2 B2] @ [A1; A2]``.

    Raises:
        ValueError: no adapter given, or the layers differ.
    """
    parts = list(adapters)
    if not parts:
        raise ValueError("nothing to stack")
    names = parts[0].layers.keys()
    if any(part.layers.keys() != names for part in parts):
        raise ValueError("adapters of different layers cannot be stacked")
    return Adapter(
        {
            name: LoraFactors(
                torch.cat([part.layers[name].A for part in parts], dim=0),
                torch.cat([part.scaling * part.layers[name].B for part in parts], dim=1),
            )
            for name in names
        }
    )


def split(adapter: Adapter, rank: int) -> tuple[Adapter, Adapter]:
    """Undo a stack of two: the first ``rank`` directions, and the rest."""
    return (
        Adapter(
            {n: LoraFactors(f.A[:rank], f.B[:, :rank]) for n, f in adapter.layers.items()},
            adapter.scaling,
        ),
        Adapter(
            {n: LoraFactors(f.A[rank:], f.B[:, rank:]) for n, f in adapter.layers.items()},
            adapter.scaling,
        ),
    )


def nonzero_rank(adapter: Adapter) -> int:
    """Return the number of rows up to the last one that is not zero in every layer; at least 1."""
    live = torch.zeros(adapter.rank, dtype=torch.bool)
    for factors in adapter.layers.values():
        live |= (factors.A != 0).any(dim=1).cpu() | (factors.B != 0).any(dim=0).cpu()
    rows = live.nonzero()
    return int(rows[-1]) + 1 if len(rows) else 1


def padded(adapter: Adapter, rank: int) -> Adapter:
    """Return the adapter with rows of zero up to ``rank``."""
    if adapter.rank == rank:
        return adapter
    more = zero_adapter(adapter.shapes, rank - adapter.rank, adapter.scaling)
    return side_by_side(adapter, more)


def side_by_side(first: Adapter, second: Adapter) -> Adapter:
    """Return one adapter with the directions of both, of whose scaling there is one."""
    layers = {
        name: LoraFactors(torch.cat([f.A, g.A]), torch.cat([f.B, g.B], dim=1))
        for (name, f), g in zip(first.layers.items(), second.layers.values(), strict=True)
    }
    return Adapter(layers, first.scaling)


def is_nonzero(adapter: Adapter) -> bool:
    """Return whether the adapter changes the model at all."""
    return any(bool(factors.B.any()) for factors in adapter.layers.values())


@dataclass(frozen=True)
class Spectrum:
    """Thin SVD of one layer's update, ``U @ diag(S) @ Vh``, float64.

    Attributes:
        U: ``(d_out, k)``. S: ``(k,)``, descending. Vh: ``(k, d_in)``; ``k <= rank``.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor


def spectrum(factors: LoraFactors, scaling: float = 1.0) -> Spectrum:
    """Return the thin SVD of ``scaling * B @ A`` through QR of both factors.

    Cost ``O((d_out + d_in) r^2 + r^3)``. The sign of each pair of vectors is fixed (the
    largest entry of the left vector is positive), so equal inputs give equal outputs.
    """
    q_b, r_b = torch.linalg.qr(factors.B.double())
    q_a, r_a = torch.linalg.qr(factors.A.double().T)
    u, s, vh = torch.linalg.svd(scaling * r_b @ r_a.T, full_matrices=False)
    left, right = q_b @ u, vh @ q_a.T
    peak = left.abs().argmax(dim=0, keepdim=True)
    sign = torch.where(left.gather(0, peak) < 0, -1.0, 1.0)
    return Spectrum(left * sign, s, right * sign.T)


def strong_part(parts: Spectrum, share: float) -> Spectrum:
    """Return the directions above ``share`` of the strongest; none of a layer of zeros."""
    kept = parts.S.gt(share * parts.S[0])
    return Spectrum(parts.U[:, kept], parts.S[kept], parts.Vh[kept])


def compress(adapter: Adapter, rank: int) -> Adapter:
    """Return the best rank-``rank`` approximation (Eckart-Young), scaling 1.

    Each singular value is shared evenly: ``B = U sqrt(S)``, ``A = sqrt(S) Vh``. When the
    adapter has fewer directions than ``rank``, zero rows pad it, so the size never depends
    on how much was learnt, and the result is exact.
    """
    return Adapter(
        {
            name: refactor(spectrum(factors, adapter.scaling), rank)
            for name, factors in adapter.layers.items()
        }
    )


def refactor(parts: Spectrum, rank: int) -> LoraFactors:
    """Return balanced float32 factors of the leading ``rank`` directions, zero-padded."""
    kept = min(rank, parts.S.numel())
    root = parts.S[:kept].sqrt()
    pad = rank - kept
    a = torch.nn.functional.pad(root[:, None] * parts.Vh[:kept], (0, 0, 0, pad))
    b = torch.nn.functional.pad(parts.U[:, :kept] * root, (0, pad))
    return LoraFactors(a.float(), b.float())


def relative_difference(first: Adapter, second: Adapter) -> float:
    """Return ``||dW1 - dW2|| / ||dW2||`` over all layers, computed on factors.

    0 when both are zero; infinite when only ``second`` is.
    """
    gap = size = 0.0
    for name, factors in second.layers.items():
        other = first.layers[name]
        joint = LoraFactors(
            torch.cat([other.A, factors.A], dim=0),
            torch.cat([first.scaling * other.B, -second.scaling * factors.B], dim=1),
        )
        gap += float(spectrum(joint).S.square().sum())
        size += float(spectrum(factors, second.scaling).S.square().sum())
    if size == 0.0:
        return 0.0 if gap == 0.0 else math.inf
    return math.sqrt(gap / size)


def fingerprint(adapter: Adapter) -> str:
    """Return a name for these values; equal adapters have equal names."""
    hashed = hashlib.sha256(str(adapter.scaling).encode())
    for name in sorted(adapter.layers):
        factors = adapter.layers[name]
        hashed.update(f"{name} {tuple(factors.A.shape)}".encode())
        hashed.update(factors.A.contiguous().numpy().tobytes())
        hashed.update(factors.B.contiguous().numpy().tobytes())
    return hashed.hexdigest()
