"""What a local step may have of the project's measures against memory and time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measures:
    """What a contestant of the ladder has of what we do; the base model counts in all.

    Attributes:
        layers: one frozen product per adapted layer, and plain attention on short texts.
        passes: a batch is cut into passes of ``train.tokens_per_microbatch``.
        allocator: freed blocks and few compiled kernels are kept.
    """

    precision: str = "float32"
    layers: bool = False
    passes: bool = False
    allocator: bool = False
