"""FedEx-LoRA: factor means, and what they miss kept as an exact residual."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deal_core.aggregation.aggregation_error import ErrorMeter
from deal_core.aggregation.fedit import BothMeans
from deal_core.aggregation.rule import BOTH, Aggregate, Aggregation, ClientUpdate, check_update
from deal_core.aggregation.running import ProductSum
from deal_core.aggregation.split import residual_of
from deal_core.lora.adapter import Adapter, LoraFactors


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

    Attributes:
        rank_cap: largest rank of the residual; 0: none is cut and the rule is exact. With a
            cap ``error`` equals ``lost``.
    """

    rank_cap: int = 0

    @property
    def mixed_ranks(self) -> bool:
        """False: factors of different shapes have no mean."""
        return False

    def trained(self, server_round: int) -> frozenset[str]:
        """Return both factors in every round."""
        return BOTH

    def begin(self, before: Adapter, server_round: int) -> Aggregation:
        """Start a round."""
        return _Round(before, self.rank_cap)


class _Round:
    def __init__(self, before: Adapter, rank_cap: int) -> None:
        self._before, self._rank_cap = before, rank_cap
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
        residual = residual_of(spectra, self._rank_cap)
        current = self._means.rounded()
        reading = self._error_meter.read(current, residual.adapter)
        lost = reading.share(residual.cut)
        return Aggregate(current, residual.adapter, reading.error, lost, reading.estimated)

    def _drift(self, layers: Mapping[str, LoraFactors]) -> dict[str, LoraFactors]:
        return {
            name: LoraFactors(
                layers[name].A.double() - start.A.double(),
                layers[name].B.double() - start.B.double(),
            )
            for name, start in self._before.layers.items()
        }
