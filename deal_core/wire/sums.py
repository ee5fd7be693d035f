"""Sums on the wire: names, shapes and values are checked before anything is done with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from deal_core.lora.payload import PayloadError, WireArray
from deal_core.wire.adapter_record import checked_arrays
from deal_core.wire.sum_codes import EXACT, SUM_CODES, SumCode

Shapes = Mapping[str, tuple[int, ...]]
EXACTLY: Mapping[str, str] = {}
"""All sums as they are, in float32."""


def pack_sums(
    parts: Sequence[Mapping[str, Tensor]], codes: Mapping[str, str] = EXACTLY
) -> dict[str, NDArray[Any]]:
    """Return the sums of several tasks as they travel: ``PLACE.NAME``, and what a code has beside.

    Args:
        parts: of each task, name to sums.
        codes: name to its form, one of ``SUM_CODES``; a name that is not in it is exact.
    """
    return {
        f"{place}.{name}{ending}": array
        for place, sums in enumerate(parts)
        for name, value in sums.items()
        for ending, array in _form(name, codes).encode(value).items()
    }


def largest_array(shapes: Shapes, codes: Mapping[str, str] = EXACTLY) -> int:
    """Return the bytes of the largest array of a task's sums as they travel."""
    headers = (_form(name, codes).headers(shape).values() for name, shape in shapes.items())
    return max(header.nbytes for own in headers for header in own)


def read_sums(
    record: Mapping[str, WireArray], shapes: Sequence[Shapes], codes: Mapping[str, str] = EXACTLY
) -> list[dict[str, Tensor]]:
    """Return the sums of each task, float64: undo :func:`pack_sums`.

    Args:
        record: as it arrived.
        shapes: what is expected of each task.
        codes: as for packing; a message does not choose its own.

    Raises:
        PayloadError: a key too many or too few, another type, shape or number of bytes, a value
            that is not finite, or what no code makes.
    """
    headers = [
        {name: _form(name, codes).headers(shape) for name, shape in own.items()} for own in shapes
    ]
    expected = {
        f"{place}.{name}{ending}": header
        for place, own in enumerate(headers)
        for name, endings in own.items()
        for ending, header in endings.items()
    }
    arrays = require_finite(checked_arrays(record, expected))
    return [
        {
            name: _form(name, codes).decode({e: arrays[f"{place}.{name}{e}"] for e in endings})
            for name, endings in own.items()
        }
        for place, own in enumerate(headers)
    ]


def _form(name: str, codes: Mapping[str, str]) -> SumCode:
    return SUM_CODES[codes.get(name, EXACT)]


def require_finite(arrays: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
    """Return the arrays.

    Raises:
        PayloadError: a value is not finite.
    """
    for key, array in arrays.items():
        if not np.isfinite(array).all():
            raise PayloadError(f"{key[:80]}: a value is not finite")
    return arrays
