"""Rules that sum products of factors: FLoRA, of clients of any rank, and FedEx-LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from deal_core.aggregation.aggregation_error import ErrorMeter
from deal_core.aggregation.means import BothMeans
from deal_core.aggregation.rule import BOTH, Aggregate, Aggregation, ClientUpdate, check_update
from deal_core.aggregation.running import ProductSum, head
from deal_core.lora.adapter import (
    Adapter,
    LoraFactors,
    Spectrum,
    refactor,
    spectrum,
    strong_part,
)

NEGLIGIBLE = 1e-6
"""Directions below this part of a layer's strongest are none."""


@dataclass(frozen=True)
class Flora:
    """``residual = [s_1 p_1 B_1, s_2 p_2 B_2, ...] [A_1; A_2; ...]``; ``current`` starts afresh.

    The whole aggregate goes to the residual, compressed to its numerical rank. The next
    ``current`` has the ``A`` the round started from and a zero ``B``, so it adds nothing and
    its momentum is lost each round: exact, but it learns more slowly than a warm start.
    Clients may have any rank and scaling. Source: Wang et al., NeurIPS 2024, arXiv 2409.05976.
    """

    @property
    def mixed_ranks(self) -> bool:
        """True."""
        return True

    def trained(self, server_round: int) -> frozenset[str]:
        """Return both factors in every round."""
        return BOTH

    def begin(self, before: Adapter, server_round: int) -> Aggregation:
        """Start a round."""
        return _FloraRound(before)


class _FloraRound:
    """Gathers ``sum_i w_i s_i B_i A_i`` as factors: any rank, any scaling."""

    def __init__(self, before: Adapter) -> None:
        self._before = before
        self._products = ProductSum(before.shapes)
        self._error_meter = ErrorMeter(before.shapes)
        self._weight = 0.0

    def add(self, update: ClientUpdate) -> None:
        check_update(update, self._before, BOTH, mixed_ranks=True)
        self._products.add(update.adapter.layers, update.weight * update.adapter.scaling)
        self._error_meter.add(update.adapter, update.weight)
        self._weight += update.weight

    def finish(self) -> Aggregate:
        if self._weight == 0.0:
            raise ValueError("no client update to aggregate")
        spectra = {n: self._products.spectrum(n, self._weight) for n in self._before.layers}
        residual = residual_of(spectra)
        current = self._fresh()
        reading = self._error_meter.read(current, residual)
        return Aggregate(current, residual, reading.error, reading.estimated)

    def _fresh(self) -> Adapter:
        layers = {
            name: LoraFactors(start.A, torch.zeros_like(start.B))
            for name, start in self._before.layers.items()
        }
        return Adapter(layers, self._before.scaling)


@dataclass(frozen=True)
class FedEx:
    """``current = (sum_i p_i A_i, sum_i p_i B_i)``, ``residual = s sum_i p_i (B_i - B)(A_i - A)``.

    The residual is the factor pair ``[sqrt(p_i)(B_i - B)]_i [sqrt(p_i)(A_i - A)]_i``,
    compressed to its numerical rank, at most ``min((K - 1) r, d_out, d_in)``. It is gathered
    in one pass, as ``sum_i p_i D_i E_i - D E`` with the drifts ``D_i = B_i - B_before`` and
    ``E_i = A_i - A_before`` and their means ``D, E``: the same matrix, without waiting for
    the mean.

    Memory: two float64 copies of one client, and the drifts in a
    :class:`~deal_core.aggregation.running.ProductSum`. Source: Singhal et al., ACL 2025,
    arXiv 2410.09432; here the residual is scaled, weighted and kept as LoRA factors, never
    added to a base weight.
    """

    @property
    def mixed_ranks(self) -> bool:
        """False: factors of different shapes have no mean."""
        return False

    def trained(self, server_round: int) -> frozenset[str]:
        """Return both factors in every round."""
        return BOTH

    def begin(self, before: Adapter, server_round: int) -> Aggregation:
        """Start a round."""
        return _FedExRound(before)


class _FedExRound:
    def __init__(self, before: Adapter) -> None:
        self._before = before
        self._means = BothMeans(before)
        self._error_meter = ErrorMeter(before.shapes)
        self._products = ProductSum(before.shapes)
        self._weight = 0.0

    def add(self, update: ClientUpdate) -> None:
        check_update(update, self._before, BOTH, mixed_ranks=False)
        self._products.add(self._drift(update.adapter.layers), update.weight)
        self._means.add(update)
        self._error_meter.add(update.adapter, update.weight)
        self._weight += update.weight

    def finish(self) -> Aggregate:
        self._products.add(self._drift(self._means.exact()), -self._weight)
        total = self._weight / self._before.scaling
        spectra = {name: self._products.spectrum(name, total) for name in self._before.layers}
        residual = residual_of(spectra)
        current = self._means.rounded()
        reading = self._error_meter.read(current, residual)
        return Aggregate(current, residual, reading.error, reading.estimated)

    def _drift(self, layers: Mapping[str, LoraFactors]) -> dict[str, LoraFactors]:
        return {
            name: LoraFactors(
                layers[name].A.double() - start.A.double(),
                layers[name].B.double() - start.B.double(),
            )
            for name, start in self._before.layers.items()
        }


def residual_of(spectra: Mapping[str, Spectrum]) -> Adapter | None:
    """Return the given spectra as one adapter of scaling 1; None: there is nothing to add.

    Its rank is the largest numerical rank of a layer; layers with less are zero-padded.
    """
    rank = max(parts.S.numel() for parts in spectra.values())
    if rank == 0:
        return None
    return Adapter({name: refactor(parts, rank) for name, parts in spectra.items()})


def starting_adapter(current: Adapter, rank: int, scaling: float) -> Adapter:
    """Return what a client of its own rank starts from: the best ``rank`` part of ``current``.

    As FlexLoRA redistributes (Bai et al., NeurIPS 2024, arXiv 2402.11505), on factors. ``A`` has
    orthonormal rows; where ``current`` has fewer directions than ``rank`` (zero of them in a new
    adapter), rows of ``current.A`` with zero columns of ``B`` fill up.

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
