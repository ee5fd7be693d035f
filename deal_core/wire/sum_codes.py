"""How one array of sums travels: as float32, or as int8 with what makes it numbers again.

Rounding is to nearest, so what is decoded depends on no draw, and each code bounds its error by
what travels beside it. Source: docs/method.md (M48), (M49).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deal_core.lora.payload import PayloadError
from deal_core.wire.codec import LEVELS, SCALE, Header

DIAGONAL = ".diagonal"
"""Ending of a key for the diagonal of a matrix whose other entries travel as correlations."""
LEAST = 1e-30
"""A row whose largest value is below is zero: float32 has no exact scale for it."""
Parts = Mapping[str, NDArray[Any]]
"""Ending of a key (the first is empty) to an array."""


@dataclass(frozen=True)
class SumCode:
    """One form in which an array of sums travels.

    Attributes:
        headers: shape of the array -> ending of each key and its header.
        encode: the array, float64 -> what travels.
        decode: what travelled, of these headers and finite -> the array, float64;
            :class:`PayloadError` for what no sender makes.
    """

    headers: Callable[[tuple[int, ...]], dict[str, Header]]
    encode: Callable[[Tensor], dict[str, NDArray[Any]]]
    decode: Callable[[Parts], Tensor]


def header(dtype: str, shape: tuple[int, ...]) -> Header:
    """Return the header of an array of this type and shape."""
    return Header(dtype, shape, np.dtype(dtype).itemsize * math.prod(shape))


def _float32(shape: tuple[int, ...]) -> dict[str, Header]:
    return {"": header("float32", shape)}


def _as_float32(values: Tensor) -> dict[str, NDArray[Any]]:
    return {"": np.ascontiguousarray(values.float().cpu().numpy())}


def _from_float32(parts: Parts) -> Tensor:
    return torch.from_numpy(parts[""].copy()).double()


def _rows(shape: tuple[int, ...]) -> dict[str, Header]:
    return {"": header("int8", shape), SCALE: header("float32", shape[:1])}


def _by_rows(values: Tensor) -> dict[str, NDArray[Any]]:
    """Return every row as whole multiples of its largest absolute value / 127: (M48)."""
    largest = values.abs().amax(dim=1)
    scale = torch.where(largest < LEAST, 0.0, largest / LEVELS).float()
    steps = values / torch.where(scale > 0, scale, 1.0).double()[:, None]
    return {"": _codes(steps * (scale > 0)[:, None]), SCALE: scale.numpy()}


def _from_rows(parts: Parts) -> Tensor:
    codes, scale = _checked_codes(parts[""]), torch.from_numpy(parts[SCALE].copy()).double()
    if bool((scale < 0).any()):
        raise PayloadError("a scale is negative")
    if not torch.equal(
        codes.abs().amax(dim=1), torch.where(scale > 0, float(LEVELS), 0.0).double()
    ):
        raise PayloadError("a scale is not that of its row")
    return codes * scale[:, None]


def _correlations(shape: tuple[int, ...]) -> dict[str, Header]:
    size = _size(shape[0])
    return {"": header("int8", (shape[0] - size,)), DIAGONAL: header("float32", (size,))}


def _as_correlations(values: Tensor) -> dict[str, NDArray[Any]]:
    """Return the upper triangle of a matrix without negative eigenvalues, rounding aside, as its
    diagonal and 127ths of ``s_ij / sqrt(s_ii s_jj)``, which lies in [-1, 1]: (M49)."""
    rows, columns = torch.triu_indices(*2 * (_size(len(values)),))
    diagonal = values[rows == columns].clamp(min=0.0).float()
    lengths = _lengths(diagonal, rows, columns)
    correlations = torch.where(lengths > 0, values[rows != columns] / lengths, 0.0)
    return {"": _codes(LEVELS * correlations), DIAGONAL: diagonal.numpy()}


def _from_correlations(parts: Parts) -> Tensor:
    codes, diagonal = _checked_codes(parts[""]), torch.from_numpy(parts[DIAGONAL].copy())
    if bool((diagonal < 0).any()):
        raise PayloadError("a diagonal entry is negative")
    rows, columns = torch.triu_indices(len(diagonal), len(diagonal))
    values = torch.empty(len(rows), dtype=torch.float64)
    values[rows == columns] = diagonal.double()
    values[rows != columns] = codes / LEVELS * _lengths(diagonal, rows, columns)
    return values


def _lengths(diagonal: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return ``sqrt(s_ii s_jj)`` of the entries beside the diagonal, float64."""
    roots, beside = diagonal.double().sqrt(), rows != columns
    return roots[rows[beside]] * roots[columns[beside]]


def _size(entries: int) -> int:
    """Return the rows of a symmetric matrix whose upper triangle has so many entries."""
    return (math.isqrt(8 * entries + 1) - 1) // 2


def _codes(steps: Tensor) -> NDArray[Any]:
    return np.ascontiguousarray(steps.round().clamp(-LEVELS, LEVELS).to(torch.int8).numpy())


def _checked_codes(codes: NDArray[Any]) -> Tensor:
    """Return codes as float64.

    Raises:
        PayloadError: one is out of range.
    """
    if (codes < -LEVELS).any():
        raise PayloadError("a code is out of range")
    return torch.from_numpy(codes.copy()).double()


EXACT, ROWS, CORRELATIONS = "exact", "rows", "correlations"
SUM_CODES: Mapping[str, SumCode] = {
    EXACT: SumCode(_float32, _as_float32, _from_float32),
    ROWS: SumCode(_rows, _by_rows, _from_rows),
    CORRELATIONS: SumCode(_correlations, _as_correlations, _from_correlations),
}
"""Name to form. ``rows``: of an array with two axes; ``correlations``: of the upper triangle of a
positive semidefinite matrix, row after row."""
ROUNDED_AT = "int8"
"""The ``wire.dtype`` at which sums travel by codes; at any other they are exact."""
