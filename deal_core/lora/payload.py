"""What a model's parameters are between client and server: LoRA factors; and, for methods that are
made of them, sums over records and label heads. All that may leave a client: :mod:`client.egress`.

Both sides use the same names and the same checks. A tensor is known by PEFT's key
(``base_model.model.LAYER.lora_A.weight``), so a saved adapter loads in plain PEFT.

Without torch: a site's light process, one for every message, looks at what leaves.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

LORA = "lora"
"""Record of the current adapter."""
RETAINED = "retained"
"""Record of the retained adapter. It changes once a stage, and is sent to a client once."""
RESIDUAL = "residual"
"""Record of what an exact aggregation rule found no room for; left out where there is nothing."""
HEADS = "heads"
"""Record of the label heads that a client answers with: a task each."""
SUMS = "sums"
"""Part of a checkpoint: what clients' sums add up to."""
WORSE = "worse"
"""Figure: whether a client's own records are answered better without class means."""
PREFIX = "base_model.model."
MOST_EXAMPLES = 10_000_000
"""A larger count is a lie or a bug."""

Arrays = dict[str, NDArray[np.float32]]


class WireArray(Protocol):
    """A tensor as it came over the wire: a header, and bytes that are not decoded yet."""

    dtype: str
    shape: tuple[int, ...]
    stype: str
    data: bytes


class PayloadError(ValueError):
    """A payload that is refused. The message names the key and the fault, never a value."""


@dataclass(frozen=True)
class Header:
    """What can be known of an array before its bytes are decoded."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)


def factor_of(key: str) -> str:
    """Return ``lora_A`` or ``lora_B``, whose key it is."""
    return key.removesuffix(".weight").rpartition(".")[2]


def check_headers(
    given: Mapping[str, WireArray | NDArray[Any]], expected: Mapping[str, Header]
) -> None:
    """Check keys, types and shapes. Nothing that is expected has more than three axes: of more the
    rest is not looked at.

    Raises:
        PayloadError: one is not as expected.
    """
    extra, missing = sorted(given.keys() - expected.keys()), sorted(expected.keys() - given.keys())
    if extra:
        raise PayloadError(f"unexpected key {str(extra[0])[:120]!r} (+{len(extra) - 1} more)")
    if missing:
        raise PayloadError(f"missing key {missing[0]!r} (+{len(missing) - 1} more)")
    for key, want in expected.items():
        dtype, shape = str(given[key].dtype), tuple(given[key].shape[:3])
        if dtype != want.dtype:
            raise PayloadError(f"{key}: dtype {dtype[:20]}, expected {want.dtype}")
        if shape != want.shape:
            raise PayloadError(f"{key}: shape {shape}, expected {want.shape}")
