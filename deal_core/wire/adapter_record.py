"""One adapter on the wire: packed by the sender, checked before decoding by the receiver.

Both sides agree on ``wire.dtype`` beforehand; a message does not choose its own format. An
exact format carries values. A lossy one carries, from client to server, the change against
what the client was sent: its scale shrinks as training settles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deal_core.lora.adapter import Adapter
from deal_core.lora.arrays import learnt_shapes, to_arrays, with_factors
from deal_core.lora.payload import (
    Arrays,
    Header,
    PayloadError,
    WireArray,
    check_headers,
    factor_of,
)
from deal_core.wire.codec import CODECS, WireArrays

EXACT = "float32"
NUMPY = "numpy.ndarray"
"""Flower's name for an array in numpy's own format."""
BOTH = frozenset({"lora_A", "lora_B"})
LARGEST_VALUE = 1e3
"""Of an adapter that a client trains on; those of trained ones are a thousand times smaller."""


def pack(adapter: Adapter, dtype: str, generator: torch.Generator) -> WireArrays:
    """Return the whole adapter as it travels from server to client."""
    return encode(dtype, to_arrays(adapter), generator)


def encode(dtype: str, arrays: Arrays, generator: torch.Generator) -> WireArrays:
    """Return what travels for the given tensors; PayloadError where a value is not finite."""
    encoded: WireArrays = {}
    for key, array in arrays.items():
        if not np.isfinite(array).all():
            raise PayloadError(f"{key}: a value is not finite")
        encoded.update(CODECS[dtype].encode(key, array, generator))
    return encoded


def unpack(record: Mapping[str, WireArray], dtype: str, like: Adapter) -> Adapter:
    """Return the adapter that :func:`pack` packed, of the layers, rank and scaling of ``like``;
    PayloadError for anything else."""
    return with_factors(like, _decoded(record, dtype, like, BOTH, {}))


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

    The caller passes what was lost in again: then the sum of all decoded messages differs from the
    sum of all changes by the last loss alone. It belongs to the coordinates that it arose in: drop
    it when the task or the other factor's basis changes.

    Args:
        adapter: after local training.
        before: as the client received it.
        dtype: ``wire.dtype``.
        trained: factors that learnt in this round; the others do not travel.
        feedback: what the code lost in earlier rounds.
        generator: of the stochastic rounding.
    """
    arrays = selected(adapter, trained)
    if dtype == EXACT:
        return arrays, {}
    start = to_arrays(before)
    wanted: Arrays = {}
    for key, array in arrays.items():
        change = array - start[key]
        wanted[key] = change + feedback[key] if key in feedback else change
    encoded = encode(dtype, wanted, generator)
    lost = {key: array - CODECS[dtype].decode(key, encoded) for key, array in wanted.items()}
    return encoded, lost


def unpack_update(
    record: Mapping[str, WireArray], dtype: str, before: Adapter, trained: frozenset[str]
) -> Adapter:
    """Return the adapter after a client's training, which began from ``before``: undo
    :func:`pack_update`. Factors that did not learn are those of ``before``.

    Raises:
        PayloadError: anything else has arrived.
    """
    sent = {} if dtype == EXACT else selected(before, trained)
    return with_factors(before, _decoded(record, dtype, before, trained, sent))


def selected(adapter: Adapter, trained: frozenset[str]) -> Arrays:
    """Return the arrays of these factors."""
    return {key: each for key, each in to_arrays(adapter).items() if factor_of(key) in trained}


def require_bounded(adapter: Adapter) -> None:
    """Check that no value is far from any that training gives, so that no text overflows.

    Raises:
        PayloadError: names the layer.
    """
    for name, factors in adapter.layers.items():
        for factor in (factors.A, factors.B):
            if factor.numel() and not float(factor.abs().max()) <= LARGEST_VALUE:
                raise PayloadError(f"{name}: a value beyond {LARGEST_VALUE:g}")


def _decoded(
    record: Mapping[str, WireArray],
    dtype: str,
    like: Adapter,
    trained: frozenset[str],
    sent: Arrays,
) -> dict[str, Tensor]:
    """Return key to factor, in one piece of memory, in the order of the layers: what follows can
    take an update as one long vector. What was ``sent`` is added to what has arrived.

    Raises:
        PayloadError: another form than expected, or a value that is not finite.
    """
    codec, shapes = CODECS[dtype], learnt_shapes(like, trained)
    headers = {k: h for key, shape in shapes.items() for k, h in codec.headers(key, shape).items()}
    arrays = checked_arrays(record, headers)
    sizes = [math.prod(shape) for shape in shapes.values()]
    parts = torch.split(torch.empty(sum(sizes)), sizes)
    decoded = {}
    with np.errstate(over="ignore", invalid="ignore"):
        for (key, shape), part in zip(shapes.items(), parts, strict=True):
            values = codec.decode(key, arrays)
            decoded[key] = part.view(shape)
            decoded[key].numpy()[:] = values + sent[key] if key in sent else values
            if not np.isfinite(part.numpy()).all():
                raise PayloadError(f"{key}: a value is not finite")
    return decoded


def checked_arrays(
    record: Mapping[str, WireArray], expected: Mapping[str, Header]
) -> dict[str, NDArray[Any]]:
    """Return the arrays of a record, views of its bytes, after a check of names, types, shapes and
    sizes: the bytes must be, to the last one, numpy's for the header. Nothing is parsed and nothing
    copied, so a message cannot make the reader do anything.

    Raises:
        PayloadError: other keys, types, shapes or bytes than expected; never a value.
    """
    entries = dict(record.items())  # Flower's record looks up slowly
    check_headers(entries, expected)
    for key in expected:
        if entries[key].stype != NUMPY:
            raise PayloadError(f"{key}: not serialised by numpy")
    arrays: dict[str, NDArray[Any]] = {}
    for key, want in expected.items():
        data, start = entries[key].data, _npy_header(want)
        if len(data) != len(start) + want.nbytes or not data.startswith(start):
            raise PayloadError(f"{key}: {len(data)} bytes that are not those of its header")
        arrays[key] = np.frombuffer(data, want.dtype, offset=len(start)).reshape(want.shape)
    return arrays


@lru_cache(maxsize=256)
def _npy_header(header: Header) -> bytes:
    """Return what ``numpy.save`` writes before the values."""
    buffer = BytesIO()
    np.save(buffer, np.empty(header.shape, header.dtype), allow_pickle=False)
    return buffer.getvalue()[: -header.nbytes]
