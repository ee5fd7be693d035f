"""FLoRA: stack the clients' factors; the next round starts from a fresh adapter."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deal_core.aggregation.products import ProductRound
from deal_core.aggregation.rule import BOTH, Aggregate, Aggregation
from deal_core.aggregation.split import residual_of
from deal_core.lora.adapter import Adapter, LoraFactors


@dataclass(frozen=True)
class Flora:
    """``residual = [s_1 p_1 B_1, s_2 p_2 B_2, ...] [A_1; A_2; ...]``; ``current`` starts afresh.

    The whole aggregate goes to the residual, compressed to its numerical rank. The next
    ``current`` has the ``A`` the round started from and a zero ``B``, so it adds nothing and
    its momentum is lost each round: exact, but it learns more slowly than a warm start.
    Clients may have any rank and scaling. Source: Wang et al., NeurIPS 2024, arXiv 2409.05976.

    Attributes:
        rank_cap: largest rank of the residual; 0: none is cut and the rule is exact.
    """

    rank_cap: int = 0

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
        before = products.before
        residual = residual_of(products.spectra(), self.rank_cap)
        return products.measured(_fresh(before), residual.adapter, residual.cut)


def _fresh(before: Adapter) -> Adapter:
    layers = {
        name: LoraFactors(start.A, torch.zeros_like(start.B))
        for name, start in before.layers.items()
    }
    return Adapter(layers, before.scaling)
