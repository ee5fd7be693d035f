"""RoLoRA: ``B`` in odd rounds, ``A`` in even rounds."""

from __future__ import annotations

from dataclasses import dataclass

from deal_core.aggregation.one_factor import OneFactorRound, rounded
from deal_core.aggregation.rule import LORA_A, LORA_B, Aggregation
from deal_core.lora.adapter import Adapter


@dataclass(frozen=True)
class Alternating:
    """The mean of the trained factor, the other unchanged: exact, linear, half the bytes.

    Round 1 trains ``B``: of a new adapter, whose ``B`` is zero, ``A`` has no gradient. A task
    of one round is therefore FFA-LoRA. Source: Chen et al., NeurIPS 2025, arXiv 2502.01755.
    """

    @property
    def mixed_ranks(self) -> bool:
        """False: one frozen factor for all."""
        return False

    def trained(self, server_round: int) -> frozenset[str]:
        """Return ``lora_B`` in odd rounds, ``lora_A`` in even ones."""
        return frozenset({LORA_B if server_round % 2 else LORA_A})

    def begin(self, before: Adapter, server_round: int) -> Aggregation:
        """Start a round."""
        (factor,) = self.trained(server_round)
        return OneFactorRound(before, factor, rounded)
