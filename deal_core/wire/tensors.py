"""How tensors travel: adapters and label heads, packed by the sender, and checked by the receiver
before anything is decoded. Both sides agree on ``wire.dtype`` beforehand; a message does not choose
its own format.

Adapters. ``float32`` is exact, and carries values. ``int8`` quarters the bytes, with one float32
scale for each of the ``r`` rank directions (a row of ``lora_A``, a column of ``lora_B``: one scale
per row of eight numbers would cost half as much again), and stochastic rounding, so that the
decoded tensor is unbiased: ``E[decode(encode(x))] = x``, with a variance of at most
``scale^2 / 4``, ``scale = max |direction| / 127``. A second encoding of what was decoded loses
nothing. From client to server it carries the change against what the client was sent, whose scale
shrinks as training settles; sender and receiver must then hold the same ``before`` to the bit.
Where one factor is common to all clients the product is linear in the other one: errors average
out over clients and, with error feedback, over rounds. When both are coded, ``(B + e)(A + f)`` is
still unbiased, but ``e f`` adds variance. An exact rule is exact for the *decoded* updates. Source
of error feedback: Seide et al. 2014; Karimireddy et al., ICML 2019, arXiv 1901.09847.

Heads. float32, or weights as int8 by rows and biases as they are. Rounding is to nearest, so what
is decoded depends on no draw. Source: docs/method.md (M48).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deal_core.lora.adapter import Adapter
from deal_core.lora.payload import Arrays, Header, PayloadError, WireArray, check_headers, factor_of
from deal_core.lora.state import learnt_shapes, to_arrays, with_factors

WireArrays = dict[str, NDArray[Any]]
"""Wire name to array: float32, or int8 and float32 scales."""
EXACT = "float32"
NUMPY = "numpy.ndarray"
"""Flower's name for an array in numpy's own format."""
BOTH = frozenset({"lora_A", "lora_B"})
LARGEST_VALUE = 1e3
"""Of an adapter that a client trains on; those of trained ones are a thousand times smaller."""
SCALE = ".scale"
LEVELS = 127
LARGEST_HEAD = 1e10
"""Of an entry of a head: what is beyond would make scores that are no numbers."""
BIAS = "bias/"
"""Before a task's name, which has no slash: biases of a head whose weights are rounded."""
LEAST = 1e-30
"""A row whose largest value is below is zero: float32 has no exact scale for it."""
ROUNDED_AT = "int8"
"""The ``wire.dtype`` at which heads may be rounded; at any other they are exact."""


@dataclass(frozen=True)
class Codec:
    """One wire format for one tensor."""

    headers: Callable[[str, tuple[int, ...]], dict[str, Header]]
    """From key and shape to the headers of what travels."""
    encode: Callable[[str, NDArray[np.float32], torch.Generator], WireArrays]
    decode: Callable[[str, Mapping[str, NDArray[Any]]], NDArray[np.float32]]
    """From key and what travels, already checked."""


def _int8_headers(key: str, shape: tuple[int, ...]) -> dict[str, Header]:
    return {key: Header("int8", shape), key + SCALE: Header("float32", (shape[1 - _within(key)],))}


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


def _shortened(values: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
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


def encode(dtype: str, arrays: Arrays, generator: torch.Generator) -> WireArrays:
    """Return what travels for the given tensors; PayloadError where a value is not finite."""
    encoded: WireArrays = {}
    for key, array in arrays.items():
        if not np.isfinite(array).all():
            raise PayloadError(f"{key}: a value is not finite")
        encoded.update(CODECS[dtype].encode(key, array, generator))
    return encoded


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


def unpack(
    record: Mapping[str, WireArray],
    dtype: str,
    like: Adapter,
    trained: frozenset[str] | None = None,
) -> Adapter:
    """Return the adapter that a record carries; its factors lie in one piece of memory, in the
    order of the layers: what follows can take an update as one long vector.

    Args:
        record: what has arrived.
        dtype: ``wire.dtype``.
        like: has the layers, rank and scaling; of an update, the adapter that training began from.
        trained: the factors that learnt: the record is what :func:`pack_update` made, and the other
            factors are those of ``like``; None: it is a whole adapter of the server's.

    Raises:
        PayloadError: another form than expected, or a value that is not finite.
    """
    sent = {} if trained is None or dtype == EXACT else selected(like, trained)
    codec, shapes = CODECS[dtype], learnt_shapes(like, BOTH if trained is None else trained)
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
    return with_factors(like, decoded)


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


def pack_heads(heads: Mapping[str, Tensor], rounded: bool = False) -> WireArrays:
    """Return label heads, task to ``(labels, size + 1)``, as they travel; ``rounded``: weights of
    each row as whole multiples of its largest / 127, (M48)."""
    packed: WireArrays = {}
    for task, head in heads.items():
        if not rounded:
            packed[task] = np.ascontiguousarray(head.float().numpy())
            continue
        values = head[:, :-1].double()
        largest = values.abs().amax(dim=1)
        scale = torch.where(largest < LEAST, 0.0, largest / LEVELS).float()
        steps = values / torch.where(scale > 0, scale, 1.0).double()[:, None]
        codes = (steps * (scale > 0)[:, None]).round().clamp(-LEVELS, LEVELS).to(torch.int8)
        packed[BIAS + task] = np.ascontiguousarray(head[:, -1].float().numpy())
        packed[task], packed[task + SCALE] = np.ascontiguousarray(codes.numpy()), scale.numpy()
    return packed


def read_heads(
    record: Mapping[str, WireArray], shapes: Mapping[str, tuple[int, int]], rounded: bool = False
) -> dict[str, Tensor]:
    """Return the head of each task, float32: undo :func:`pack_heads`. A message does not choose
    shapes, or whether heads are rounded.

    Raises:
        PayloadError: a key too many or too few, another type, shape or number of bytes, a value
            that is not finite or out of bounds, or what no code makes.
    """
    expected: dict[str, Header] = {}
    for task, (labels, entries) in shapes.items():
        if rounded:
            expected[task] = Header("int8", (labels, entries - 1))
            expected[BIAS + task] = expected[task + SCALE] = Header("float32", (labels,))
        else:
            expected[task] = Header("float32", (labels, entries))
    arrays = checked_arrays(record, expected)
    for key, array in arrays.items():
        if not np.isfinite(array).all():
            raise PayloadError(f"{key[:80]}: a value is not finite")
    heads = {}
    for task in shapes:
        head = torch.from_numpy(arrays[task].copy())
        if rounded:
            weights = _from_rows(head.double(), arrays[task + SCALE]).float()
            bias = torch.from_numpy(arrays[BIAS + task].copy())
            head = torch.cat([weights, bias[:, None]], dim=1)
        if head.numel() and not float(head.abs().max()) <= LARGEST_HEAD:
            raise PayloadError(f"heads: a value of {task[:80]!r} is out of bounds")
        heads[task] = head
    return heads


def tasks_in(record: Mapping[str, WireArray], rounded: bool = False) -> tuple[str, ...]:
    """Return the tasks that a record of heads is of, in its order."""
    if not rounded:
        return tuple(record)
    return tuple(key.removeprefix(BIAS) for key in record if key.startswith(BIAS))


def _from_rows(codes: Tensor, scales: NDArray[Any]) -> Tensor:
    """The weights that were rounded by rows, float64."""
    if bool((codes < -LEVELS).any()):
        raise PayloadError("a code is out of range")
    scale = torch.from_numpy(scales.copy()).double()
    if bool((scale < 0).any()):
        raise PayloadError("a scale is negative")
    largest = torch.where(scale > 0, float(LEVELS), 0.0).double()
    if not torch.equal(codes.abs().amax(dim=1), largest):
        raise PayloadError("a scale is not that of its row")
    return codes * scale[:, None]
