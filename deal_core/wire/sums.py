"""Sums and label heads on the wire: names, shapes and values are checked before anything is done
with them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deal_core.lora.payload import PayloadError, WireArray
from deal_core.wire.adapter_record import checked_arrays
from deal_core.wire.codec import Header

Shapes = Mapping[str, tuple[int, ...]]
LARGEST_HEAD = 1e10
"""Of an entry of a head: what is beyond would make scores that are no numbers."""


def pack_sums(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, NDArray[Any]]:
    """Return the sums of several tasks as they travel: ``PLACE.NAME``, float32."""
    return {
        f"{place}.{name}": np.ascontiguousarray(value.float().cpu().numpy())
        for place, sums in enumerate(parts)
        for name, value in sums.items()
    }


def read_sums(record: Mapping[str, WireArray], shapes: Sequence[Shapes]) -> list[dict[str, Tensor]]:
    """Return the sums of each task, float64: undo :func:`pack_sums`.

    Args:
        record: as it arrived.
        shapes: what is expected of each task.

    Raises:
        PayloadError: a key too many or too few, another type, shape or number of bytes, or a value
            that is not finite.
    """
    expected = {
        f"{place}.{name}": _header("float32", shape)
        for place, own in enumerate(shapes)
        for name, shape in own.items()
    }
    tensors = _finite(checked_arrays(record, expected))
    return [
        {name: tensors[f"{place}.{name}"].double() for name in own}
        for place, own in enumerate(shapes)
    ]


def pack_heads(heads: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Return label heads as they travel: a key each task, float32."""
    return {task: np.ascontiguousarray(head.float().numpy()) for task, head in heads.items()}


def read_heads(record: Mapping[str, WireArray], shapes: Shapes) -> dict[str, Tensor]:
    """Return the head of each task: undo :func:`pack_heads`.

    Raises:
        PayloadError: as :func:`read_sums`; or a value out of bounds.
    """
    expected = {task: _header("float32", shape) for task, shape in shapes.items()}
    heads = _finite(checked_arrays(record, expected))
    for task, head in heads.items():
        if head.numel() and float(head.abs().max()) > LARGEST_HEAD:
            raise PayloadError(f"heads: a value of {task[:80]!r} is out of bounds")
    return heads


def _header(dtype: str, shape: tuple[int, ...]) -> Header:
    return Header(dtype, shape, np.dtype(dtype).itemsize * math.prod(shape))


def _finite(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    for key, array in arrays.items():
        if not np.isfinite(array).all():
            raise PayloadError(f"{key[:80]}: a value is not finite")
    return {key: torch.from_numpy(array.copy()) for key, array in arrays.items()}
