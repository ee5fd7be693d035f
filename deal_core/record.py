"""One adapter on the wire: packed by the sender, checked before decoding by the receiver.

Both sides agree on ``wire.dtype`` beforehand; a message does not choose its own format. An
exact format carries values. A lossy one carries, from client to server, the change against
what the client was sent: its scale shrinks as training settles.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray

from deal_core import codec
from deal_core.adapters import Adapter
from deal_core.codec import CODECS, Codec, Encoded, Header
from deal_core.errors import choose
from deal_core.payload import (
    NPY_HEADER_BYTES,
    Arrays,
    PayloadError,
    Template,
    WireArray,
    from_arrays,
    to_arrays,
)

EXACT = "float32"
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
    start = to_arrays(before)
    part = codec.decode(codec_named(dtype), encoded, template, trained)
    if dtype != EXACT:
        part = codec.from_change(part, start)
    return from_arrays(codec.merge(start, part), template, before.scaling)


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
    arrays: dict[str, NDArray[Any]] = {}
    for key in expected:
        data = record[key].data
        overhead = len(data) - expected[key].nbytes
        if overhead != _npy_header_bytes(data) or overhead > NPY_HEADER_BYTES:
            raise PayloadError(f"{key}: {len(data)} bytes do not fit the shape")
        try:
            arrays[key] = record[key].numpy()
        except Exception as error:
            raise PayloadError(f"{key}: cannot be decoded ({type(error).__name__})") from None
    return arrays


def _header(entry: WireArray) -> Header:
    """The header that the sender claims; its bytes are compared with it afterwards.

    Nothing that is expected has three axes, so of a shape with more the rest is not looked at.
    """
    shape = tuple(entry.shape[:3])
    size = 1
    for length in shape:
        size *= max(0, int(length))
    return Header(str(entry.dtype), shape, size * _ITEM_BYTES.get(entry.dtype, 0))


def _npy_header_bytes(data: bytes) -> int:
    """Length of numpy's own header, version 1.0; nothing may stand between or after the values."""
    return 10 + int.from_bytes(data[8:10], "little")


_ITEM_BYTES = {"float32": 4, "uint16": 2, "int8": 1}
