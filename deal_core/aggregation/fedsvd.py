"""FedSVD: clients train ``B``; after each round an SVD makes the rows of ``A`` orthonormal."""

from __future__ import annotations

from dataclasses import dataclass

from deal_core.aggregation.one_factor import OneFactorRound
from deal_core.aggregation.rule import LORA_B, Aggregation
from deal_core.aggregation.split import orthonormal
from deal_core.lora.adapter import Adapter, spectrum


@dataclass(frozen=True)
class FedSvd:
    """``U S Vh = svd(s (sum_i p_i B_i) A)``; next ``A = Vh[:r]``, ``B = U[:, :r] S[:r] / s``.

    Exact, for the rank of ``B A`` is at most ``r``. The SVD reads no data: under differential
    privacy it is free, and with ``||A||_2 = 1`` per-example gradients of ``B`` are not inflated.
    The coordinates of ``B`` change from round to round, so a client that feeds back the error
    of a lossy codec must drop its residual, or carry it over as ``E A_old A_new^T``.
    Source: Lee et al., NeurIPS 2025, arXiv 2505.12805.
    """

    @property
    def mixed_ranks(self) -> bool:
        """False: one ``A`` for all."""
        return False

    def trained(self, server_round: int) -> frozenset[str]:
        """Return ``lora_B`` in every round."""
        return frozenset({LORA_B})

    def begin(self, before: Adapter, server_round: int) -> Aggregation:
        """Start a round."""
        return OneFactorRound(before, LORA_B, refactored)


def refactored(adapter: Adapter) -> Adapter:
    """Return the same product with orthonormal rows in ``A``, in float32."""
    layers = {
        name: orthonormal(spectrum(factors, adapter.scaling), adapter.scaling, factors)
        for name, factors in adapter.layers.items()
    }
    return Adapter(layers, adapter.scaling)
