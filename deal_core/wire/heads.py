"""Label heads on the wire: float32, or weights as int8 by rows and biases as they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deal_core.lora.payload import PayloadError, WireArray
from deal_core.wire.adapter_record import checked_arrays
from deal_core.wire.codec import Header
from deal_core.wire.sum_codes import EXACT, ROWS, SUM_CODES
from deal_core.wire.sums import Shapes, require_finite

LARGEST_HEAD = 1e10
"""Of an entry of a head: what is beyond would make scores that are no numbers."""
BIAS = "bias/"
"""Before a task's name, which has no slash: biases of a head whose weights are rounded."""


def pack_heads(heads: Mapping[str, Tensor], rounded: bool = False) -> dict[str, NDArray[Any]]:
    """Return label heads as they travel.

    Args:
        heads: task to ``(labels, size + 1)`` or ``(labels, 2, size + 1)``.
        rounded: weights of each row as whole multiples of its largest / 127: (M48).
    """
    packed: dict[str, NDArray[Any]] = {}
    for task, head in heads.items():
        if not rounded:
            packed[task] = np.ascontiguousarray(head.float().numpy())
            continue
        weights = head[..., :-1].flatten(0, -2).double()
        packed[BIAS + task] = np.ascontiguousarray(head[..., -1].float().numpy())
        for ending, array in SUM_CODES[ROWS].encode(weights).items():
            packed[task + ending] = array
    return packed


def read_heads(
    record: Mapping[str, WireArray], shapes: Shapes, rounded: bool = False
) -> dict[str, Tensor]:
    """Return the head of each task, float32: undo :func:`pack_heads`.

    Args:
        record: as it arrived.
        shapes: task to the shape of its head.
        rounded: as they were packed; a message does not choose.

    Raises:
        PayloadError: a key too many or too few, another type, shape or number of bytes, a value
            that is not finite or out of bounds, or what no code makes.
    """
    expected: dict[str, Header] = {}
    for task, shape in shapes.items():
        expected |= _headers(task, shape, rounded)
    arrays = require_finite(checked_arrays(record, expected))
    heads = {task: _head(arrays, task, shape, rounded) for task, shape in shapes.items()}
    for task, head in heads.items():
        if head.numel() and not float(head.abs().max()) <= LARGEST_HEAD:
            raise PayloadError(f"heads: a value of {task[:80]!r} is out of bounds")
    return heads


def tasks_in(record: Mapping[str, WireArray], rounded: bool = False) -> tuple[str, ...]:
    """Return the tasks that a record of heads is of, in its order."""
    if not rounded:
        return tuple(record)
    return tuple(key.removeprefix(BIAS) for key in record if key.startswith(BIAS))


def _headers(task: str, shape: tuple[int, ...], rounded: bool) -> dict[str, Header]:
    exact = SUM_CODES[EXACT].headers
    if not rounded:
        return {task: exact(shape)[""]}
    own = SUM_CODES[ROWS].headers(_weights(shape))
    return {BIAS + task: exact(shape[:-1])[""], **{task + end: part for end, part in own.items()}}


def _weights(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of a head's weights as rows of one matrix."""
    return math.prod(shape[:-1]), shape[-1] - 1


def _head(
    arrays: Mapping[str, NDArray[Any]], task: str, shape: tuple[int, ...], rounded: bool
) -> Tensor:
    if not rounded:
        return torch.from_numpy(arrays[task].copy())
    code = SUM_CODES[ROWS]
    endings = code.headers(_weights(shape))
    weights = code.decode({end: arrays[task + end] for end in endings}).float()
    bias = torch.from_numpy(arrays[BIAS + task].copy())
    return torch.cat([weights.reshape(*shape[:-1], -1), bias[..., None]], dim=-1)
