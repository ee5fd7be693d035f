"""Bytes of messages and records: a kind, then parts, each behind its length.

``b"DSS1"``, one byte with the length of the kind, the kind, and for each part four bytes with its
length (little endian) and the part itself. A value has one encoding, so equal bytes mean equal
messages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from deal_core.secure_sum.protocol_error import ProtocolError

MAGIC = b"DSS1"
"""Name and version of the protocol: what begins otherwise is of another."""


def pack(kind: str, *parts: bytes) -> bytes:
    """Return one frame."""
    name = kind.encode()
    framed = [MAGIC, bytes([len(name)]), name]
    for part in parts:
        framed += [len(part).to_bytes(4, "little"), part]
    return b"".join(framed)


def unpack(kind: str, data: bytes, number: int | None = None) -> list[bytes]:
    """Return the parts of a frame of this kind.

    Args:
        kind: what it must be.
        data: the whole frame.
        number: how many parts it must have; None: any number.

    Raises:
        ProtocolError: the frame is of another kind or version, cut short, or too long.
    """
    head = pack(kind)
    if data[: len(head)] != head:
        raise ProtocolError(f"a message is no '{kind}' of this version of the protocol")
    parts, position = [], len(head)
    while position < len(data):
        start = position + 4
        position = start + int.from_bytes(data[position:start], "little")
        parts.append(bytes(data[start:position]))
    if position != len(data) or (number is not None and len(parts) != number):
        raise ProtocolError(f"a message '{kind}' is cut short or too long")
    return parts


def number_bytes(value: int) -> bytes:
    """Return eight bytes, little endian."""
    return value.to_bytes(8, "little")


def number_from(data: bytes) -> int:
    """Return the number that :func:`number_bytes` wrote.

    Raises:
        ProtocolError: it is not eight bytes, or above 2^63 - 1.
    """
    value = int.from_bytes(data, "little")
    if len(data) != 8 or value >= 2**63:
        raise ProtocolError("a number in a message is out of range")
    return value


def positions_bytes(positions: Iterable[int]) -> bytes:
    """Return a set of positions as bits, the first in the lowest bit of the first byte; no zero
    byte at the end."""
    bits = 0
    for position in positions:
        bits |= 1 << position
    return bits.to_bytes((bits.bit_length() + 7) // 8, "little")


def positions_from(data: bytes, below: int) -> tuple[int, ...]:
    """Return the positions in ascending order.

    Raises:
        ProtocolError: a position is not below ``below``, or the bytes are not the shortest.
    """
    bits = int.from_bytes(data, "little")
    if bits >> below or positions_bytes_length(bits) != len(data):
        raise ProtocolError("a message names a site that is not in the cohort")
    return tuple(position for position in range(below) if bits >> position & 1)


def positions_bytes_length(bits: int) -> int:
    """Return how many bytes a set has."""
    return (bits.bit_length() + 7) // 8


def join(items: Sequence[bytes]) -> bytes:
    """Return items of equal length, one after another."""
    return b"".join(items)


def split(data: bytes, size: int) -> tuple[bytes, ...]:
    """Return the items that :func:`join` joined.

    Raises:
        ProtocolError: the length is no multiple of ``size``.
    """
    if len(data) % size:
        raise ProtocolError("a list in a message has a wrong length")
    return tuple(data[start : start + size] for start in range(0, len(data), size))
