"""How tensors travel: float32 or int8, and only the factors trained in the round.

Which to choose. ``float32`` is exact. ``int8`` quarters the bytes, with one float32 scale for each
of the ``r`` rank directions (a row of ``lora_A``, a column of ``lora_B``: one scale per row of
eight numbers would cost half as much again), and stochastic rounding, so that the decoded
tensor is unbiased: ``E[decode(encode(x))] = x``, with a variance of at most ``scale^2 / 4``,
``scale = max |direction| / 127``. A second encoding of what was decoded loses nothing.

Send changes, of one factor a round. The coarser the code, the better it is spent on ``arrays -
before``, whose scale shrinks as training settles; sender and receiver must then hold the same
``before`` to the bit. Where one factor is common to all clients the product is linear in the other
one: errors average out over clients and, with error feedback, over rounds. When both are coded,
``(B + e)(A + f)`` is still unbiased, but ``e f`` adds variance. An exact rule is exact for the
*decoded* updates. Source of error feedback: Seide et al. 2014; Karimireddy et al., ICML 2019, arXiv
1901.09847.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deal_core.lora.payload import Header, PayloadError, factor_of

WireArrays = dict[str, NDArray[Any]]
"""Wire name to array: float32, or int8 and float32 scales."""

SCALE = ".scale"
LEVELS = 127


@dataclass(frozen=True)
class Codec:
    """One wire format for one tensor."""

    headers: Callable[[str, tuple[int, ...]], dict[str, Header]]
    """From key and shape to the headers of what travels."""
    encode: Callable[[str, NDArray[np.float32], torch.Generator], WireArrays]
    decode: Callable[[str, Mapping[str, NDArray[Any]]], NDArray[np.float32]]
    """From key and what travels, already checked."""


def _int8_headers(key: str, shape: tuple[int, ...]) -> dict[str, Header]:
    return {
        key: Header("int8", shape),
        key + SCALE: Header("float32", (shape[1 - _within(key)],)),
    }


def _int8_encode(key: str, array: NDArray[np.float32], generator: torch.Generator) -> WireArrays:
    """Return ``x / scale`` rounded down or up with the probability that is right on average.

    What was decoded is encoded again to the bit, whatever is drawn: codes times a scale of 17
    bits are exact, so the steps are whole, and the largest is ``LEVELS`` again.
    """
    axis = _within(key)
    scale = _shortened(np.abs(array).max(axis=axis) / np.float32(LEVELS))
    steps = array / np.expand_dims(np.where(scale > 0, scale, np.float32(1)), axis)
    uniform = torch.rand(array.shape, generator=generator).double().numpy()  # n + u < n + 1
    codes = np.clip(np.floor(steps + uniform), -LEVELS, LEVELS).astype(np.int8)
    return {key: codes, key + SCALE: scale}


def _shortened(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the same values, cut to 17 significant bits: less by 2^-16 of them at most."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return (bits & np.uint32(0xFFFFFF80)).view(np.float32)


def _int8_decode(key: str, encoded: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    codes, scale = encoded[key], encoded[key + SCALE]
    if (codes < -LEVELS).any():
        raise PayloadError(f"{key}: a code is out of range")
    if not (np.isfinite(scale).all() and (scale >= 0).all()):
        raise PayloadError(f"{key}{SCALE}: a scale is negative or not finite")
    with np.errstate(over="ignore"):
        decoded: NDArray[np.float32] = codes * np.expand_dims(scale, _within(key))
    return decoded


def _within(key: str) -> int:
    """Return the axis that runs within one rank direction: along rows of A, columns of B."""
    return 1 if factor_of(key) == "lora_A" else 0


CODECS: dict[str, Codec] = {
    "float32": Codec(
        lambda key, shape: {key: Header("float32", shape)},
        lambda key, array, generator: {key: array},
        lambda key, encoded: encoded[key],
    ),
    "int8": Codec(_int8_headers, _int8_encode, _int8_decode),
}
"""``wire.dtype`` to format."""
