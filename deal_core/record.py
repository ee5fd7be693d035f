"""One adapter on the wire: packed by the sender, checked before decoding by the receiver.

Both sides agree on ``wire.dtype`` beforehand; a message does not choose its own format. An
exact format carries values. A lossy one carries, from client to server, the change against
what the client was sent: its scale shrinks as training settles.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deal_core import codec
from deal_core.adapters import Adapter, LoraFactors
from deal_core.codec import CODECS, Codec, Encoded, Header
from deal_core.errors import choose
from deal_core.payload import (
    PREFIX,
    Arrays,
    PayloadError,
    Template,
    WireArray,
    from_arrays,
    to_arrays,
)

EXACT = "float32"
NUMPY = "numpy.ndarray"
"""Flower's name for an array in numpy's own format."""
BOTH = frozenset({"lora_A", "lora_B"})


def codec_named(dtype: str) -> Codec:
    """Return the codec of ``wire.dtype``; UserError when there is none."""
    return choose("wire.dtype", dtype, CODECS)


def pack(adapter: Adapter, dtype: str, generator: torch.Generator) -> Encoded:
    """Return the whole adapter as it travels from server to client."""
    return codec.encode(codec_named(dtype), to_arrays(adapter), generator)


def unpack(encoded: Mapping[str, NDArray[Any]], dtype: str, like: Adapter) -> Adapter:
    """Undo :func:`pack`; ``like`` has the expected layers, rank and scaling.

    Raises:
        PayloadError: anything that is not expected.
    """
    template = Template(like.shapes, like.rank)
    arrays = codec.decode(codec_named(dtype), encoded, template, BOTH)
    return from_arrays(arrays, template, like.scaling)


def pack_update(
    adapter: Adapter,
    before: Adapter,
    dtype: str,
    trained: frozenset[str],
    feedback: Arrays,
    generator: torch.Generator,
) -> tuple[Encoded, Arrays]:
    """Return the trained factors as they travel from client to server.

    Args:
        adapter: after local training.
        before: as the client received it.
        dtype: ``wire.dtype``.
        trained: factors that learnt in this round; the others do not travel.
        feedback: what the code lost in earlier rounds; empty at first.
        generator: of the stochastic rounding.

    Returns:
        What travels, and what the code lost this time (empty for the exact format).
    """
    arrays = codec.select(to_arrays(adapter), trained)
    if dtype == EXACT:
        return arrays, {}
    change = codec.to_change(arrays, to_arrays(before))
    return codec.encode_with_feedback(codec_named(dtype), change, feedback, generator)


def frozen_factors(adapter: Adapter, trained: frozenset[str]) -> Arrays:
    """Return the factors that do not learn in this round: the basis that a change is told in."""
    return codec.select(to_arrays(adapter), BOTH - trained)


def unpack_update(
    encoded: Mapping[str, NDArray[Any]], before: Adapter, dtype: str, trained: frozenset[str]
) -> Adapter:
    """Undo :func:`pack_update`: factors that did not travel are those of ``before``.

    Raises:
        PayloadError: anything that is not expected.
    """
    template = Template(before.shapes, before.rank)
    part = codec.decode(codec_named(dtype), encoded, template, trained)
    return _after(before, part, dtype)


def receive_update(
    record: Mapping[str, WireArray], before: Adapter, dtype: str, trained: frozenset[str]
) -> Adapter:
    """:func:`decode_checked`, then :func:`unpack_update`; headers are checked once.

    Raises:
        PayloadError: anything that is not expected.
    """
    template = Template(before.shapes, before.rank)
    arrays = decode_checked(record, dtype, template, trained)
    part = codec.values(codec_named(dtype), arrays, template, trained)
    return _after(before, part, dtype)


def _after(before: Adapter, part: Arrays, dtype: str) -> Adapter:
    """The adapter that the trained factors, or in a lossy format their changes, lead to."""
    if dtype == EXACT:
        return _replaced(before, part)
    with np.errstate(over="ignore"):
        part = codec.from_change(part, to_arrays(before))
    for key, array in part.items():
        if not np.isfinite(array).all():
            raise PayloadError(f"{key}: a value is not finite")
    return _replaced(before, part)


def _replaced(before: Adapter, part: Arrays) -> Adapter:
    """``before`` with the tensors of ``part``; the others stay the same objects, uncopied."""

    def factor(name: str, which: str, start: Tensor) -> Tensor:
        array = part.get(f"{PREFIX}{name}.{which}.weight")
        return start if array is None else torch.from_numpy(array)

    layers = {
        name: LoraFactors(factor(name, "lora_A", f.A), factor(name, "lora_B", f.B))
        for name, f in before.layers.items()
    }
    return Adapter(layers, before.scaling)


def decode_checked(
    record: Mapping[str, WireArray], dtype: str, template: Template, trained: frozenset[str]
) -> dict[str, NDArray[Any]]:
    """Refuse a record by names, types, shapes and sizes; only then turn bytes into arrays.

    Raises:
        PayloadError: names the key and the fault, never a value.
    """
    expected = codec.expected_headers(codec_named(dtype), template, trained)
    given = {key: _header(entry) for key, entry in record.items()}
    codec.check_headers(given, expected)
    for key, entry in record.items():
        if entry.stype != NUMPY:
            raise PayloadError(f"{key}: not serialised by numpy")
    return {key: _values(key, record[key].data, header) for key, header in expected.items()}


def _values(key: str, data: bytes, header: Header) -> NDArray[Any]:
    """A view of an array's values: the bytes must be, to the last one, numpy's for the header.

    Nothing is parsed and nothing copied, so a message cannot make the reader do anything.
    """
    start = _npy_header(header.dtype, header.shape)
    if len(data) != len(start) + header.nbytes or not data.startswith(start):
        raise PayloadError(f"{key}: {len(data)} bytes that are not those of its header")
    return np.frombuffer(data, header.dtype, offset=len(start)).reshape(header.shape)


@lru_cache(maxsize=256)
def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """What ``numpy.save`` writes before the values."""
    buffer = BytesIO()
    np.save(buffer, np.empty(shape, dtype), allow_pickle=False)
    return buffer.getvalue()[: -int(np.dtype(dtype).itemsize * np.prod(shape))]


def _header(entry: WireArray) -> Header:
    """The header that the sender claims; its bytes are compared with it afterwards.

    Nothing that is expected has three axes, so of a shape with more the rest is not looked at.
    """
    shape = tuple(entry.shape[:3])
    size = 1
    for length in shape:
        size *= max(0, int(length))
    return Header(str(entry.dtype), shape, size * _ITEM_BYTES.get(entry.dtype, 0))


_ITEM_BYTES = {"float32": 4, "uint16": 2, "int8": 1}
