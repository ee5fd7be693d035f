"""From spectra to adapters: what a given rank holds, and the rest as a residual."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from deal_core.aggregation.running import head, tail
from deal_core.lora.adapter import (
    Adapter,
    LoraFactors,
    Spectrum,
    refactor,
    spectrum,
    strong_part,
)


@dataclass(frozen=True)
class Residual:
    """A residual adapter (None: nothing to add) and the Frobenius norm of what a cap cut off."""

    adapter: Adapter | None
    cut: float


def orthonormal(parts: Spectrum, scaling: float, start: LoraFactors) -> LoraFactors:
    """Return factors of ``start``'s rank ``r`` with orthonormal rows in ``A``, float32.

    ``A = Vh[:r]``, ``B = U[:, :r] diag(S[:r]) / scaling``, so that ``scaling * B A`` is the best
    rank-``r`` part. The singular values go to ``B`` whole: were they shared, a new adapter
    (``S = 0``) would have ``A = B = 0`` and never learn. Directions that the spectrum lacks
    keep the rows of ``start.A`` and get a zero column in ``B``: exact, and still trainable.
    """
    rank = start.A.shape[0]
    held = head(parts, rank)
    missing = rank - held.S.numel()
    left = held.U * (held.S / scaling)
    a = torch.cat([held.Vh.float(), start.A[rank - missing :].float()])
    return LoraFactors(a, torch.nn.functional.pad(left, (0, missing)).float())


def residual_of(spectra: Mapping[str, Spectrum], rank_cap: int) -> Residual:
    """Return the given spectra as one adapter of scaling 1.

    Its rank is the largest numerical rank of a layer (layers with less are zero-padded), or
    ``rank_cap`` when that is less and not 0; the cut is then the least possible in Frobenius
    norm (Eckart-Young).
    """
    rank = max(parts.S.numel() for parts in spectra.values())
    if rank_cap:
        rank = min(rank, rank_cap)
    cut = sum(float(tail(parts, rank).S.square().sum()) for parts in spectra.values())
    if rank == 0:
        return Residual(None, 0.0)
    layers = {name: refactor(parts, rank) for name, parts in spectra.items()}
    return Residual(Adapter(layers), math.sqrt(cut))


NEGLIGIBLE = 1e-6
"""Directions below this part of a layer's strongest are none."""


def starting_adapter(current: Adapter, rank: int, scaling: float) -> Adapter:
    """Return what a client of its own rank starts from: the best ``rank`` part of ``current``.

    FlexLoRA's redistribution (Bai et al., NeurIPS 2024) on factors. ``A`` has orthonormal rows;
    where ``current`` has fewer directions than ``rank`` (zero of them in a new adapter), rows
    of ``current.A`` with zero columns of ``B`` fill up.

    Args:
        current: the server's adapter, of the largest rank in the federation.
        rank: the client's rank ``r_i``; equal to the server's rank returns the same product.
        scaling: the client's ``lora_alpha / r_i``.

    Raises:
        ValueError: ``rank`` is less than 1 or more than the server's.
    """
    if not 1 <= rank <= current.rank:
        raise ValueError(f"client rank {rank}: the server's adapter has rank {current.rank}")
    layers = {}
    for name, factors in current.layers.items():
        parts = strong_part(spectrum(factors, current.scaling), NEGLIGIBLE)
        layers[name] = orthonormal(parts, scaling, LoraFactors(factors.A[:rank], factors.B))
    return Adapter(layers, scaling)
