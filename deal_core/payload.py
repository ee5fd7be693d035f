"""What may leave a client and what may reach it: LoRA and distilled parameters, nothing else.

Both sides use the same names and the same checks. A tensor is known by PEFT's key
(``base_model.model.LAYER.lora_A.weight``), so a saved adapter loads in plain PEFT.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from deal_core.adapters import Adapter, LoraFactors, Shapes

LORA = "lora"
"""Record of the current adapter."""
DISTILLED = "distilled"
"""Record of the retained adapter."""
PREFIX = "base_model.model."

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
class Template:
    """What a record must look like.

    Attributes:
        shapes: layer name to ``(d_out, d_in)``.
        rank: expected rank, the same in every layer.
    """

    shapes: Shapes
    rank: int

    def expected(self) -> dict[str, tuple[int, int]]:
        """Return key to shape of every tensor."""
        keys: dict[str, tuple[int, int]] = {}
        for name, (d_out, d_in) in self.shapes.items():
            keys[f"{PREFIX}{name}.lora_A.weight"] = (self.rank, d_in)
            keys[f"{PREFIX}{name}.lora_B.weight"] = (d_out, self.rank)
        return keys


def to_arrays(adapter: Adapter) -> Arrays:
    """Return the adapter's tensors as float32 arrays under PEFT's keys."""
    arrays: Arrays = {}
    for name, factors in adapter.layers.items():
        arrays[f"{PREFIX}{name}.lora_A.weight"] = factors.A.detach().cpu().numpy()
        arrays[f"{PREFIX}{name}.lora_B.weight"] = factors.B.detach().cpu().numpy()
    return arrays


def from_arrays(
    arrays: Mapping[str, NDArray[np.generic]], template: Template, scaling: float
) -> Adapter:
    """Check every array and return the adapter.

    Raises:
        PayloadError: a key too many or too few, a wrong dtype or shape, a value that is
            not finite.
    """
    expected = template.expected()
    check_keys(arrays.keys(), expected.keys())
    for key, shape in expected.items():
        check_header(key, str(arrays[key].dtype), arrays[key].shape, shape)
        if not np.isfinite(arrays[key]).all():
            raise PayloadError(f"{key}: a value is not finite")
    return Adapter(
        {
            name: LoraFactors(
                torch.from_numpy(np.array(arrays[f"{PREFIX}{name}.lora_A.weight"], np.float32)),
                torch.from_numpy(np.array(arrays[f"{PREFIX}{name}.lora_B.weight"], np.float32)),
            )
            for name in template.shapes
        },
        scaling,
    )


def check_keys(given: Iterable[str], expected: Iterable[str]) -> None:
    """Raise :class:`PayloadError` unless both are the same set of keys."""
    extra = sorted(set(given) - set(expected))
    missing = sorted(set(expected) - set(given))
    if extra:
        raise PayloadError(f"unexpected key {str(extra[0])[:120]!r} (+{len(extra) - 1} more)")
    if missing:
        raise PayloadError(f"missing key {missing[0]!r} (+{len(missing) - 1} more)")


def check_header(key: str, dtype: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise :class:`PayloadError` unless dtype is float32 and the shape is the expected one."""
    if dtype != "float32":
        raise PayloadError(f"{key}: dtype {dtype[:20]}, expected float32")
    if tuple(shape) != tuple(expected):
        raise PayloadError(f"{key}: shape {tuple(shape)}, expected {tuple(expected)}")
