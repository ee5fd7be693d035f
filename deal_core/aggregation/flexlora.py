"""FlexLoRA: one SVD of the ideal update, redistributed; clients of different ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from deal_core.aggregation.products import ProductRound
from deal_core.aggregation.rule import BOTH, Aggregate, Aggregation
from deal_core.aggregation.running import tail
from deal_core.aggregation.split import Residual, orthonormal, residual_of
from deal_core.lora.adapter import Adapter, Spectrum


@dataclass(frozen=True)
class FlexLora:
    """``U S Vh = sum_i p_i s_i B_i A_i``; ``current`` is its best part of the server's rank.

    The SVD runs on the stacked factors (two QRs and a core of ``sum_i r_i``), never on the
    dense update. A client of rank ``r_i`` starts from
    :func:`~deal_core.aggregation.split.starting_adapter`; the server's rank should be the
    largest. Both factors get their share of ``S`` (all of it in ``B``).
    Source: Bai et al., NeurIPS 2024, arXiv 2402.11505.

    Attributes:
        rank_cap: largest rank of the residual; 0: no cap.
        keep_tail: True: what the rank of ``current`` cannot hold becomes the residual, and the
            rule is exact; False: it is dropped, as in the paper, and reported as ``lost``.
    """

    rank_cap: int = 0
    keep_tail: bool = True

    @property
    def mixed_ranks(self) -> bool:
        """True."""
        return True

    def trained(self, server_round: int) -> frozenset[str]:
        """Return both factors in every round."""
        return BOTH

    def begin(self, before: Adapter, server_round: int) -> Aggregation:
        """Start a round."""
        return ProductRound(before, self._finish)

    def _finish(self, products: ProductRound) -> Aggregate:
        before, spectra = products.before, products.spectra()
        layers = {
            name: orthonormal(parts, before.scaling, before.layers[name])
            for name, parts in spectra.items()
        }
        rest = {name: tail(parts, before.rank) for name, parts in spectra.items()}
        residual = residual_of(rest, self.rank_cap) if self.keep_tail else _dropped(rest)
        return products.measured(Adapter(layers, before.scaling), residual.adapter, residual.cut)


def _dropped(rest: dict[str, Spectrum]) -> Residual:
    square = sum(float(parts.S.square().sum()) for parts in rest.values())
    return Residual(None, math.sqrt(square))
