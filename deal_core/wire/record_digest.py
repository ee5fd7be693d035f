"""A name for the content of an array record: equal only for records that are equal to the byte."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from deal_core.lora.payload import WireArray


def record_digest(arrays: Mapping[str, WireArray]) -> str:
    """Return 64 hexadecimal digits: BLAKE2b over names, types, shapes and bytes."""
    hashed = hashlib.blake2b(digest_size=32)
    for key, array in sorted(arrays.items()):
        hashed.update(f"{key} {array.dtype} {tuple(array.shape)} {array.stype} ".encode())
        hashed.update(len(array.data).to_bytes(8, "little"))
        hashed.update(array.data)
    return hashed.hexdigest()
