"""How survivors tell each other that they were told the same survivors."""

from __future__ import annotations

import hashlib
import hmac

from deal_core.secure_sum.frames import number_bytes
from deal_core.secure_sum.keys import derive

TAG_BYTES = 16


def agreement_tag(
    channel: bytes, context: bytes, sender: int, receiver: int, survivors: bytes
) -> bytes:
    """Return what only the two ends of a channel can make: the sender was told these survivors.

    Args:
        channel: key that the two sites share for the run.
        context: digest of the terms.
        sender: position in the cohort.
        receiver: position in the cohort.
        survivors: as the bytes of their positions.
    """
    key = derive(channel, "agreement", context, number_bytes(sender), number_bytes(receiver))
    return hmac.new(key, survivors, hashlib.sha256).digest()[:TAG_BYTES]


def same_tag(first: bytes, second: bytes) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(first, second)
