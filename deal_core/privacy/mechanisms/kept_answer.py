"""An update as bytes that a ledger keeps, to answer the same request with the same."""

from __future__ import annotations

import json

import numpy as np
from safetensors.numpy import load, save

from deal_core.privacy.interface import LocalUpdate


def packed(made: LocalUpdate) -> bytes:
    """Return an update as bytes that a ledger keeps."""
    arrays = {key: np.ascontiguousarray(value) for key, value in made.arrays.items()}
    return save(arrays, {"figures": json.dumps(dict(made.figures))})


def unpacked(answer: bytes) -> LocalUpdate:
    """Undo :func:`packed`."""
    length = int.from_bytes(answer[:8], "little")
    header = json.loads(answer[8 : 8 + length])
    return LocalUpdate(load(answer), json.loads(header["__metadata__"]["figures"]))
