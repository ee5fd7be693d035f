"""FFA-LoRA: ``A`` is frozen at its start, clients train ``B``."""

from __future__ import annotations

from dataclasses import dataclass

from deal_core.aggregation.one_factor import OneFactorRound, rounded
from deal_core.aggregation.rule import LORA_B, Aggregation
from deal_core.lora.adapter import Adapter


@dataclass(frozen=True)
class Ffa:
    """``B = sum_i p_i B_i``, ``A`` unchanged: exact, linear, half the bytes.

    What it costs is capacity: the update stays in the row space of the first ``A``.
    Source: Sun et al., ICLR 2024, arXiv 2403.12313.
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
        return OneFactorRound(before, LORA_B, rounded)
