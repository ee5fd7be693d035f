"""A name for the content of an array record: equal only for records that are equal to the byte."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from deal_core.lora.payload import WireArray


def record_digest(arrays: Mapping[str, WireArray]) -> str:
    """Return 64 hexadecimal digits: BLAKE2b over names, types, shapes and bytes."""
    hashed = hashlib.blake2b(digest_size=32)
    for key, array in sorted(arrays.items()):
        header = [key, array.dtype, list(array.shape), array.stype]
        hashed.update(json.dumps(header).encode() + b"\0")
        hashed.update(len(array.data).to_bytes(8, "little"))
        hashed.update(array.data)
    return hashed.hexdigest()
