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

from deal_core.errors import choose
from deal_core.lora.adapter import Adapter, LoraFactors
from deal_core.lora.arrays import from_arrays, to_arrays
from deal_core.lora.payload import (
    PREFIX,
    Arrays,
    PayloadError,
    Template,
    WireArray,
    check_keys,
)
from deal_core.wire import codec
from deal_core.wire.codec import CODECS, Codec, Header, WireArrays

EXACT = "float32"
NUMPY = "numpy.ndarray"
"""Flower's name for an array in numpy's own format."""
BOTH = frozenset({"lora_A", "lora_B"})
LARGEST_VALUE = 1e3
"""Of an adapter that a client trains on; those of trained ones are a thousand times smaller."""


def codec_named(dtype: str) -> Codec:
    """Return the codec of ``wire.dtype``; UserError when there is none."""
    return choose("wire.dtype", dtype, CODECS)


def pack(adapter: Adapter, dtype: str, generator: torch.Generator) -> WireArrays:
    """Return the whole adapter as it travels from server to client."""
    return codec.encode(codec_named(dtype), to_arrays(adapter), generator)


def unpack(encoded: Mapping[str, NDArray[Any]], dtype: str, like: Adapter) -> Adapter:
    """Return the adapter that :func:`pack` packed, of the layers, rank and scaling of ``like``;
    PayloadError for anything else."""
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
) -> tuple[WireArrays, Arrays]:
    """Return the trained factors as they travel from client to server, and what the code lost this
    time (empty for the exact format).

    Args:
        adapter: after local training.
        before: as the client received it.
        dtype: ``wire.dtype``.
        trained: factors that learnt in this round; the others do not travel.
        feedback: what the code lost in earlier rounds; empty at first.
        generator: of the stochastic rounding.
    """
    arrays = codec.select(to_arrays(adapter), trained)
    if dtype == EXACT:
        return arrays, {}
    start = to_arrays(before)
    change = {key: array - start[key] for key, array in arrays.items()}
    return codec.encode_with_feedback(codec_named(dtype), change, feedback, generator)


def require_bounded(adapter: Adapter) -> None:
    """Check that no value is far from any that training gives, so that no text overflows.

    Raises:
        PayloadError: names the layer.
    """
    for name, factors in adapter.layers.items():
        for factor in (factors.A, factors.B):
            if factor.numel() and not float(factor.abs().max()) <= LARGEST_VALUE:
                raise PayloadError(f"{name}: a value beyond {LARGEST_VALUE:g}")


def frozen_factors(adapter: Adapter, trained: frozenset[str]) -> Arrays:
    """Return the factors that do not learn in this round: the basis that a change is told in."""
    return codec.select(to_arrays(adapter), BOTH - trained)


class UpdateReader:
    """Reads the updates of a round: checks a record, then decodes it.

    What may arrive is worked out once, for all clients that began from the same adapter,
    ``before``. The values are decoded into one piece of memory, in the order of the layers: what
    follows can take an update as one long vector. Factors that did not learn are those of
    ``before``.
    """

    def __init__(self, before: Adapter, dtype: str, trained: frozenset[str]) -> None:
        self.before = before
        self._codec = codec_named(dtype)
        template = Template(before.shapes, before.rank)
        self._headers = codec.expected_headers(self._codec, template, trained)
        self._shapes = codec.expected(template, trained)
        self._sizes = [rows * columns for rows, columns in self._shapes.values()]
        self._sent = codec.select(to_arrays(before), trained) if dtype != EXACT else {}

    def read(self, record: Mapping[str, WireArray]) -> Adapter:
        """Return the adapter after local training; PayloadError for what is not expected."""
        arrays = checked_arrays(record, self._headers)
        values = torch.empty(sum(self._sizes))
        places = zip(self._shapes.items(), torch.split(values, self._sizes), strict=True)
        parts = {key: place.view(shape) for (key, shape), place in places}
        with np.errstate(over="ignore"):
            for key, part in parts.items():
                decoded = self._codec.decode(key, arrays)
                part.numpy()[:] = decoded + self._sent[key] if key in self._sent else decoded
        if not np.isfinite(values.numpy()).all():
            fault = next(key for key, part in parts.items() if not part.isfinite().all())
            raise PayloadError(f"{fault}: a value is not finite")
        layers = {
            name: LoraFactors(  # what has not learnt stays the same object, uncopied
                parts.get(f"{PREFIX}{name}.lora_A.weight", start.A),
                parts.get(f"{PREFIX}{name}.lora_B.weight", start.B),
            )
            for name, start in self.before.layers.items()
        }
        return Adapter(layers, self.before.scaling)


def decode_checked(
    record: Mapping[str, WireArray], dtype: str, template: Template, trained: frozenset[str]
) -> dict[str, NDArray[Any]]:
    """As :func:`checked_arrays`, for the factors of an adapter."""
    return checked_arrays(record, codec.expected_headers(codec_named(dtype), template, trained))


def checked_arrays(
    record: Mapping[str, WireArray], expected: Mapping[str, Header]
) -> dict[str, NDArray[Any]]:
    """Return the arrays of a record, after a check of names, types, shapes and sizes. Nothing that
    is expected has more than three axes: of more the rest is not looked at.

    Raises:
        PayloadError: other keys, types, shapes or bytes than expected; never a value.
    """
    check_keys(record.keys(), expected.keys())
    entries = dict(record.items())  # Flower's record looks up slowly
    for key, want in expected.items():
        codec.check_header(key, entries[key].dtype, entries[key].shape[:3], want)
        if entries[key].stype != NUMPY:
            raise PayloadError(f"{key}: not serialised by numpy")
    return {key: _values(key, entries[key].data, want) for key, want in expected.items()}


def _values(key: str, data: bytes, header: Header) -> NDArray[Any]:
    """Return a view of an array's values: the bytes must be, to the last one, numpy's for the
    header.

    Nothing is parsed and nothing copied, so a message cannot make the reader do anything.

    Raises:
        PayloadError: they are not.
    """
    start = _npy_header(header.dtype, header.shape)
    if len(data) != len(start) + header.nbytes or not data.startswith(start):
        raise PayloadError(f"{key}: {len(data)} bytes that are not those of its header")
    return np.frombuffer(data, header.dtype, offset=len(start)).reshape(header.shape)


@lru_cache(maxsize=256)
def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return what ``numpy.save`` writes before the values."""
    buffer = BytesIO()
    np.save(buffer, np.empty(shape, dtype), allow_pickle=False)
    return buffer.getvalue()[: -int(np.dtype(dtype).itemsize * np.prod(shape))]
