"""Two shares on their way from one site to another, past the server.

The key of a box depends on run, round, cohort (through the digest of the terms), sender, receiver
and the sender's mask key of the round. Thus a box opens in one place only, nobody else can have
made it, and it vouches for the mask key that came beside it. A key seals one box: a second
``prepare`` has another mask key.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from deal_core.secure_sum.frames import number_bytes
from deal_core.secure_sum.keys import derive
from deal_core.secure_sum.protocol_error import ProtocolError
from deal_core.secure_sum.shamir import SECRET_BYTES

BOX_BYTES = 2 * SECRET_BYTES + 16
"""A share of the mask seed, one of the self seed, a tag."""
_NONCE = bytes(12)


def seal(
    channel: bytes, context: bytes, sender: int, receiver: int, mask_key: bytes, shares: bytes
) -> bytes:
    """Return the box.

    Args:
        channel: key that the two sites share for the run.
        context: digest of the terms.
        sender: position in the cohort.
        receiver: position in the cohort.
        mask_key: the sender's public mask key of the round.
        shares: of the mask seed and of the self seed, 32 bytes.
    """
    key = _key(channel, context, sender, receiver, mask_key)
    return AESGCM(key).encrypt(_NONCE, shares, context)


def open_box(
    channel: bytes, context: bytes, sender: int, receiver: int, mask_key: bytes, box: bytes
) -> bytes:
    """Return the two shares of a box.

    Raises:
        ProtocolError: it was not made by this sender, for this receiver, in this round, with this
            mask key.
    """
    key = _key(channel, context, sender, receiver, mask_key)
    try:
        return AESGCM(key).decrypt(_NONCE, box, context)
    except InvalidTag:
        raise ProtocolError(
            "the shares of a site do not open: they are of another round, sender or receiver, or "
            "its mask key was exchanged"
        ) from None


def _key(channel: bytes, context: bytes, sender: int, receiver: int, mask_key: bytes) -> bytes:
    return derive(channel, "box", context, number_bytes(sender), number_bytes(receiver), mask_key)
