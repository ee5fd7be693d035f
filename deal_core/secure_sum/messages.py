"""Messages of the protocol: their bytes, what each step asks and answers, and what refuses one;
and how the two sides keep what they must remember.

A message is ``b"DSS2"``, one byte with the length of its kind, the kind, and for each part four
bytes with its length (little endian) and the part itself. A value has one encoding, so equal bytes
mean equal messages. Positions are numbers of sites in the cohort of the round; a list has an item
for each position it goes with, in ascending order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, ClassVar, Self

from pydantic import ConfigDict, TypeAdapter, ValidationError

from deal_core.errors import UserError
from deal_core.secure_sum.shamir import SECRET_BYTES

KEY_BYTES = 32
TAG_BYTES = 16
ENCRYPTED_BYTES = 2 * SECRET_BYTES + 16
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


MAGIC = b"DSS2"
"""Name and version of the protocol: what begins otherwise is of another."""


def pack(kind: str, *parts: bytes) -> bytes:
    """Return one message."""
    name = kind.encode()
    packed = [MAGIC, bytes([len(name)]), name]
    for part in parts:
        packed += [len(part).to_bytes(4, "little"), part]
    return b"".join(packed)


def unpack(kind: str, data: bytes, number: int | None = None) -> list[bytes]:
    """Return the parts of what :func:`pack` made; ``number``: how many there must be.

    Raises:
        ProtocolError: another kind or version, cut short, or too long.
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
    """Return the number of :func:`number_bytes`; ProtocolError beyond 2^63 - 1 or eight bytes."""
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
    if bits >> below or (bits.bit_length() + 7) // 8 != len(data):
        raise ProtocolError("a message names a site that is not in the cohort")
    return tuple(position for position in range(below) if bits >> position & 1)


def split(data: bytes, size: int) -> tuple[bytes, ...]:
    """Return items of ``size`` bytes that were joined; ProtocolError where they do not fit."""
    if len(data) % size:
        raise ProtocolError("a list in a message has a wrong length")
    return tuple(data[start : start + size] for start in range(0, len(data), size))


WRITTEN: Mapping[str, Callable[[Any], bytes]] = {
    "bytes": bytes,
    "int": number_bytes,
    "str": str.encode,
    "tuple[bytes, ...]": b"".join,
}
"""Type of a field to what makes its part."""
READ: Mapping[str, Callable[[bytes], Any]] = {
    "bytes": bytes,
    "int": number_from,
    "str": lambda part: part.decode(errors="replace"),
}


@dataclass(frozen=True)
class Message:
    """One message: a part for each field; a list is one part, its items one after another.

    Attributes:
        kind: of the message.
        items: field that is a list to the bytes of an item.
    """

    kind: ClassVar[str]
    items: ClassVar[Mapping[str, int]] = {}

    def to_bytes(self) -> bytes:
        """Return the message."""
        made = (WRITTEN[str(each.type)](getattr(self, each.name)) for each in fields(self))
        return pack(self.kind, *made)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Return what the bytes say.

        Raises:
            ProtocolError: they are no such message.
        """
        known, values = fields(cls), dict[str, Any]()
        for each, part in zip(known, unpack(cls.kind, data, len(known)), strict=True):
            size = cls.items.get(each.name)
            values[each.name] = split(part, size) if size else READ[str(each.type)](part)
        return cls(**values)


@dataclass(frozen=True)
class RoundMessage(Message):
    """A message of a round; ``context``: digest of the round's terms."""

    context: bytes


@dataclass(frozen=True)
class Prepared(RoundMessage):
    """Reply of ``prepare``, whose request is the terms: the public half of the round's mask key, a
    commitment to the self seed, and shares for every other site of the cohort."""

    kind = "prepared"
    items = MappingProxyType({"encrypted_shares": ENCRYPTED_BYTES})

    mask_key: bytes
    commitment: bytes
    encrypted_shares: tuple[bytes, ...]

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """As :meth:`Message.from_bytes`; also of a key with a wrong length."""
        prepared = super().from_bytes(data)
        if not len(prepared.mask_key) == len(prepared.commitment) == KEY_BYTES:
            raise ProtocolError("a key in a message has a wrong length")
        return prepared


@dataclass(frozen=True)
class MaskRequest(RoundMessage):
    """Request of ``mask``, to one site: positions of all who prepared, the receiver among them, as
    bits; and what the others have sent for it."""

    kind = "mask-request"
    items = MappingProxyType({"mask_keys": KEY_BYTES, "encrypted_shares": ENCRYPTED_BYTES})

    members: bytes
    mask_keys: tuple[bytes, ...]
    encrypted_shares: tuple[bytes, ...]


@dataclass(frozen=True)
class Masked(RoundMessage):
    """Reply of ``mask``: the masked words, little endian."""

    kind = "masked"

    words: bytes


@dataclass(frozen=True)
class ConfirmRequest(RoundMessage):
    """Request of ``confirm``: whose masked vectors have arrived, as bits."""

    kind = "confirm-request"

    survivors: bytes


@dataclass(frozen=True)
class Confirmed(RoundMessage):
    """Reply of ``confirm``: a tag for every other survivor."""

    kind = "confirmed"
    items = MappingProxyType({"tags": TAG_BYTES})

    tags: tuple[bytes, ...]


@dataclass(frozen=True)
class UnmaskRequest(RoundMessage):
    """Request of ``unmask``, to one site: the survivors as they were confirmed, who of the others
    confirmed them, both as bits, and their tags for the receiver."""

    kind = "unmask-request"
    items = MappingProxyType({"tags": TAG_BYTES})

    survivors: bytes
    confirmers: bytes
    tags: tuple[bytes, ...]


@dataclass(frozen=True)
class Unmasked(RoundMessage):
    """Reply of ``unmask``: for every member one share, of the self seed of a survivor or of the
    mask seed of who dropped out."""

    kind = "unmasked"
    items = MappingProxyType({"shares": SECRET_BYTES})

    shares: tuple[bytes, ...]


class Kept:
    """A record of one side, JSON with bytes in base64; it may hold secrets."""

    __pydantic_config__ = ConfigDict(
        ser_json_bytes="base64", val_json_bytes="base64", extra="forbid"
    )

    def to_bytes(self) -> bytes:
        """Return the record."""
        return _adapter(type(self)).dump_json(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Return what a record says.

        Raises:
            ProtocolError: it is damaged, or none of this kind.
        """
        try:
            kept: Self = _adapter(cls).validate_json(data)
        except ValidationError:
            raise ProtocolError(f"a record ({cls.__name__}) is damaged") from None
        return kept


_adapters: dict[type[Kept], TypeAdapter[Any]] = {}


def _adapter(kind: type[Kept]) -> TypeAdapter[Any]:
    """Return what reads and writes records of a kind; made once."""
    if kind not in _adapters:
        _adapters[kind] = TypeAdapter(kind)
    return _adapters[kind]
