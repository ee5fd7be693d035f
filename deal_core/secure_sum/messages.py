"""Messages of the protocol: their bytes, what each leg asks and answers, and what refuses one.

A message or record is one frame: ``b"DSS1"``, one byte with the length of the kind, the kind, and
for each part four bytes with its length (little endian) and the part itself. A value has one
encoding, so equal bytes mean equal messages.

Positions are numbers of sites in the cohort of the round. A list has an item for each position it
goes with, in ascending order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from deal_core.errors import UserError
from deal_core.secure_sum.shamir import SECRET_BYTES

KEY_BYTES = 32
TAG_BYTES = 16
BOX_BYTES = 2 * SECRET_BYTES + 16
"""Encrypted shares: one of the mask seed, one of the self seed, a tag."""


class ProtocolError(UserError):
    """A message or a request that is refused. The state stays as it was, and nothing is revealed.

    Attributes:
        site: whose message it is, where one site is to blame; empty otherwise.
        code: the fixed word that a site may tell; the line stays there.
    """

    code: ClassVar[str] = "protocol"

    def __init__(self, line: str, site: bytes = b"") -> None:
        super().__init__(line)
        self.site = site


class BelowThreshold(ProtocolError):
    """Fewer sites are left than a sum needs: the round ends without one."""


class UnpinnedPeer(ProtocolError):
    """A site of the round is not among those that this one has pinned."""

    code = "unpinned"


class UsedUpdate(ProtocolError):
    """The update of a round is in another sum already."""

    code = "masked"


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


@dataclass(frozen=True)
class Prepared:
    """Reply of ``prepare``; its request is the terms.

    Attributes:
        context: digest of the terms.
        mask_key: public half of the round's mask key.
        commitment: to the self seed.
        boxes: shares for every other site of the cohort.
    """

    context: bytes
    mask_key: bytes
    commitment: bytes
    boxes: tuple[bytes, ...]

    def to_bytes(self) -> bytes:
        """Return the message."""
        return pack("prepared", self.context, self.mask_key, self.commitment, join(self.boxes))

    @staticmethod
    def from_bytes(data: bytes) -> Prepared:
        """Return what the bytes say."""
        context, mask_key, commitment, boxes = unpack("prepared", data, 4)
        _check_keys(mask_key, commitment)
        return Prepared(context, mask_key, commitment, split(boxes, BOX_BYTES))


@dataclass(frozen=True)
class MaskRequest:
    """Request of ``mask``, to one site.

    Attributes:
        context: digest of the terms.
        members: positions of all who prepared, the receiver among them, as bits.
        mask_keys: of the other members.
        boxes: from the other members to the receiver.
    """

    context: bytes
    members: bytes
    mask_keys: tuple[bytes, ...]
    boxes: tuple[bytes, ...]

    def to_bytes(self) -> bytes:
        """Return the message."""
        return pack(
            "mask-request", self.context, self.members, join(self.mask_keys), join(self.boxes)
        )

    @staticmethod
    def from_bytes(data: bytes) -> MaskRequest:
        """Return what the bytes say."""
        context, members, keys, boxes = unpack("mask-request", data, 4)
        return MaskRequest(context, members, split(keys, KEY_BYTES), split(boxes, BOX_BYTES))


@dataclass(frozen=True)
class Masked:
    """Reply of ``mask``: the masked words, little endian."""

    context: bytes
    words: bytes

    def to_bytes(self) -> bytes:
        """Return the message."""
        return pack("masked", self.context, self.words)

    @staticmethod
    def from_bytes(data: bytes) -> Masked:
        """Return what the bytes say."""
        return Masked(*unpack("masked", data, 2))


@dataclass(frozen=True)
class ConfirmRequest:
    """Request of ``confirm``: whose masked vectors have arrived, as bits."""

    context: bytes
    survivors: bytes

    def to_bytes(self) -> bytes:
        """Return the message."""
        return pack("confirm-request", self.context, self.survivors)

    @staticmethod
    def from_bytes(data: bytes) -> ConfirmRequest:
        """Return what the bytes say."""
        return ConfirmRequest(*unpack("confirm-request", data, 2))


@dataclass(frozen=True)
class Confirmed:
    """Reply of ``confirm``: a tag for every other survivor."""

    context: bytes
    tags: tuple[bytes, ...]

    def to_bytes(self) -> bytes:
        """Return the message."""
        return pack("confirmed", self.context, join(self.tags))

    @staticmethod
    def from_bytes(data: bytes) -> Confirmed:
        """Return what the bytes say."""
        context, tags = unpack("confirmed", data, 2)
        return Confirmed(context, split(tags, TAG_BYTES))


@dataclass(frozen=True)
class UnmaskRequest:
    """Request of ``unmask``, to one site.

    Attributes:
        context: digest of the terms.
        survivors: as they were confirmed.
        confirmers: positions of who confirmed them, as bits; the receiver is not among them.
        tags: from the confirmers to the receiver.
    """

    context: bytes
    survivors: bytes
    confirmers: bytes
    tags: tuple[bytes, ...]

    def to_bytes(self) -> bytes:
        """Return the message."""
        return pack(
            "unmask-request", self.context, self.survivors, self.confirmers, join(self.tags)
        )

    @staticmethod
    def from_bytes(data: bytes) -> UnmaskRequest:
        """Return what the bytes say."""
        context, survivors, confirmers, tags = unpack("unmask-request", data, 4)
        return UnmaskRequest(context, survivors, confirmers, split(tags, TAG_BYTES))


@dataclass(frozen=True)
class Unmasked:
    """Reply of ``unmask``: for every member one share, of the self seed of a survivor or of the
    mask seed of who dropped out."""

    context: bytes
    shares: tuple[bytes, ...]

    def to_bytes(self) -> bytes:
        """Return the message."""
        return pack("unmasked", self.context, join(self.shares))

    @staticmethod
    def from_bytes(data: bytes) -> Unmasked:
        """Return what the bytes say."""
        context, shares = unpack("unmasked", data, 2)
        return Unmasked(context, split(shares, SECRET_BYTES))


def _check_keys(*keys: bytes) -> None:
    if any(len(key) != KEY_BYTES for key in keys):
        raise ProtocolError("a key in a message has a wrong length")
