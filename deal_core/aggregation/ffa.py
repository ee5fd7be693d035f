"""FFA-LoRA: one factor is frozen at its start, clients train the other."""

from __future__ import annotations

from dataclasses import dataclass

from deal_core.aggregation.one_factor import OneFactorRound, rounded
from deal_core.aggregation.rule import LORA_B, Aggregation
from deal_core.lora.adapter import Adapter


@dataclass(frozen=True)
class Ffa:
    """``B = sum_i p_i B_i``, ``A`` unchanged: exact, linear, half the bytes; or the reverse.

    What it costs is capacity: the update stays in the row space of the first ``A`` (the column
    space of ``B``). Source: Sun et al., ICLR 2024, arXiv 2403.12313.

    Attributes:
        factor: what clients train, ``lora_B`` or ``lora_A``.
    """

    factor: str = LORA_B

    @property
    def mixed_ranks(self) -> bool:
        """False: one frozen factor for all."""
        return False

    def trained(self, server_round: int) -> frozenset[str]:
        """Return the one factor in every round."""
        return frozenset({self.factor})

    def begin(self, before: Adapter, server_round: int) -> Aggregation:
        """Start a round."""
        return OneFactorRound(before, self.factor, rounded)
