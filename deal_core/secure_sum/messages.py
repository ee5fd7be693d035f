"""Requests and replies of a round's legs, as values and bytes.

Positions are numbers of sites in the cohort of the round. A list has an item for each position it
goes with, in ascending order.
"""

from __future__ import annotations

from dataclasses import dataclass

from deal_core.secure_sum.agreement import TAG_BYTES
from deal_core.secure_sum.boxes import BOX_BYTES
from deal_core.secure_sum.frames import join, pack, split, unpack
from deal_core.secure_sum.keys import KEY_BYTES
from deal_core.secure_sum.protocol_error import ProtocolError
from deal_core.secure_sum.shamir import SECRET_BYTES


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
