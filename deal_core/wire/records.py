"""Names of records and fields that travel, the files of an adapter folder, and digests of both;
without torch."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deal_core.lora.payload import PayloadError, WireArray

SECURE = "secure"
"""Name of the record."""
REQUEST, REPLY = "request", "reply"
"""What the protocol asks, and answers, in bytes of its own."""
RUN = "run"
"""Name of the run, in the first message."""
ANNOUNCEMENTS, NAMES = "announcements", "names"
"""Signed channel keys of the sites of a round, and what the server calls each; with its terms."""
BLAMES = "blames"
"""Of the status, beside ``protocol``: the site whose message was refused, in hexadecimal."""
LATE_SECONDS = 600.0
"""How long after its deadline a request is still known, so that a late reply can be named."""
QUERIES = ("prepare", "confirm", "unmask")
"""Exchanges of a secure sum beside the one that carries the update (``mask``)."""


CORRECT = "correct"
"""Right answers among the labels of the task."""
EXAMPLES = "examples"
"""Test records."""
CORRECT_ALL = "correct_all"
"""Right answers among the labels of all tasks learnt so far, and the task's own."""


def count_names(all_labels: bool) -> tuple[str, ...]:
    """Return the counts of an evaluation; ``all_labels``: whether the model scores the labels of
    all tasks in one pass."""
    return (CORRECT, EXAMPLES, CORRECT_ALL) if all_labels else (CORRECT, EXAMPLES)


def record_digest(arrays: Mapping[str, WireArray]) -> str:
    """Return 64 hexadecimal digits: BLAKE2b over names, types, shapes and bytes."""
    hashed = hashlib.blake2b(digest_size=32)
    for key, array in sorted(arrays.items()):
        header = [key, array.dtype, list(array.shape), array.stype]
        hashed.update(json.dumps(header).encode() + b"\0")
        hashed.update(len(array.data).to_bytes(8, "little"))
        hashed.update(array.data)
    return hashed.hexdigest()


RECORD = "adapter-files"
"""Record, from server to sites, of the files of the adapter that a run ends with: an array of bytes
each."""
DIGEST = "adapter-digest"
"""Record of their digest."""
FILES = (
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "heads.safetensors",
    "inference.json",
)
"""All that a server sends of them, and all that a site takes."""
LARGEST = 2**30
"""Bytes of all files together."""


def read_folder(folder: Path) -> dict[str, bytes]:
    """Return the files of an adapter folder that are there, by name."""
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}


def digest_of(files: Mapping[str, bytes]) -> str:
    """Return one SHA-256 of the files' names and contents, as hexadecimal digits."""
    total = hashlib.sha256()
    for name in sorted(files):
        total.update(f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n".encode())
    return total.hexdigest()


def check_files(files: Mapping[str, NDArray[Any]], digest: str) -> dict[str, bytes]:
    """Return the files that arrived as bytes.

    Raises:
        PayloadError: a foreign name, no bytes, too many, or not what the digest is of.
    """
    for name, array in files.items():
        if name not in FILES:
            raise PayloadError(f"{RECORD}: a file that is none of an adapter folder")
        if array.dtype != np.uint8 or array.ndim != 1:
            raise PayloadError(f"{RECORD}: {name} is no row of bytes")
    if not 0 < sum(array.nbytes for array in files.values()) <= LARGEST:
        raise PayloadError(f"{RECORD}: no bytes, or more than {LARGEST}")
    found = {name: array.tobytes() for name, array in files.items()}
    if digest_of(found) != digest:
        raise PayloadError(f"{RECORD}: not what their digest says")
    return found
