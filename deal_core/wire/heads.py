"""Label heads on the wire: float32, or weights as int8 by rows and biases as they are.

Rounding is to nearest, so what is decoded depends on no draw. Source: docs/method.md (M48).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deal_core.lora.payload import Header, PayloadError, WireArray
from deal_core.wire.adapter_record import checked_arrays
from deal_core.wire.codec import LEVELS, SCALE

LARGEST_HEAD = 1e10
"""Of an entry of a head: what is beyond would make scores that are no numbers."""
BIAS = "bias/"
"""Before a task's name, which has no slash: biases of a head whose weights are rounded."""
LEAST = 1e-30
"""A row whose largest value is below is zero: float32 has no exact scale for it."""
ROUNDED_AT = "int8"
"""The ``wire.dtype`` at which heads may be rounded; at any other they are exact."""
Shapes = Mapping[str, tuple[int, int]]


def pack_heads(heads: Mapping[str, Tensor], rounded: bool = False) -> dict[str, NDArray[Any]]:
    """Return label heads, task to ``(labels, size + 1)``, as they travel; ``rounded``: weights of
    each row as whole multiples of its largest / 127, (M48)."""
    packed: dict[str, NDArray[Any]] = {}
    for task, head in heads.items():
        if not rounded:
            packed[task] = np.ascontiguousarray(head.float().numpy())
            continue
        codes, scale = by_rows(head[:, :-1].double())
        packed[BIAS + task] = np.ascontiguousarray(head[:, -1].float().numpy())
        packed[task], packed[task + SCALE] = codes, scale
    return packed


def by_rows(values: Tensor) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return codes and scales: every row as whole multiples of its largest absolute value / 127."""
    largest = values.abs().amax(dim=1)
    scale = torch.where(largest < LEAST, 0.0, largest / LEVELS).float()
    steps = values / torch.where(scale > 0, scale, 1.0).double()[:, None]
    codes = (steps * (scale > 0)[:, None]).round().clamp(-LEVELS, LEVELS).to(torch.int8)
    return np.ascontiguousarray(codes.numpy()), scale.numpy()


def read_heads(
    record: Mapping[str, WireArray], shapes: Shapes, rounded: bool = False
) -> dict[str, Tensor]:
    """Return the head of each task, float32: undo :func:`pack_heads`. A message does not choose
    shapes, or whether heads are rounded.

    Raises:
        PayloadError: a key too many or too few, another type, shape or number of bytes, a value
            that is not finite or out of bounds, or what no code makes.
    """
    expected: dict[str, Header] = {}
    for task, shape in shapes.items():
        expected |= _headers(task, shape, rounded)
    arrays = checked_arrays(record, expected)
    for key, array in arrays.items():
        if not np.isfinite(array).all():
            raise PayloadError(f"{key[:80]}: a value is not finite")
    heads = {task: _head(arrays, task, rounded) for task in shapes}
    for task, head in heads.items():
        if head.numel() and not float(head.abs().max()) <= LARGEST_HEAD:
            raise PayloadError(f"heads: a value of {task[:80]!r} is out of bounds")
    return heads


def tasks_in(record: Mapping[str, WireArray], rounded: bool = False) -> tuple[str, ...]:
    """Return the tasks that a record of heads is of, in its order."""
    if not rounded:
        return tuple(record)
    return tuple(key.removeprefix(BIAS) for key in record if key.startswith(BIAS))


def _headers(task: str, shape: tuple[int, int], rounded: bool) -> dict[str, Header]:
    if not rounded:
        return {task: Header("float32", shape)}
    labels, entries = shape
    return {
        BIAS + task: Header("float32", (labels,)),
        task: Header("int8", (labels, entries - 1)),
        task + SCALE: Header("float32", (labels,)),
    }


def _head(arrays: Mapping[str, NDArray[Any]], task: str, rounded: bool) -> Tensor:
    if not rounded:
        return torch.from_numpy(arrays[task].copy())
    weights = _from_rows(arrays[task], arrays[task + SCALE]).float()
    bias = torch.from_numpy(arrays[BIAS + task].copy())
    return torch.cat([weights, bias[:, None]], dim=1)


def _from_rows(sent: NDArray[Any], scales: NDArray[Any]) -> Tensor:
    """Return what :func:`by_rows` rounded, float64."""
    if (sent < -LEVELS).any():
        raise PayloadError("a code is out of range")
    codes, scale = torch.from_numpy(sent.copy()).double(), torch.from_numpy(scales.copy()).double()
    if bool((scale < 0).any()):
        raise PayloadError("a scale is negative")
    if not torch.equal(
        codes.abs().amax(dim=1), torch.where(scale > 0, float(LEVELS), 0.0).double()
    ):
        raise PayloadError("a scale is not that of its row")
    return codes * scale[:, None]
