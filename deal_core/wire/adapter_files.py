"""The files of a finished run's adapter folder on their way to a site: names, sizes and a digest
are checked before anything is written. Without torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deal_core.lora.payload import PayloadError

RECORD = "adapter-files"
"""Record of the files, an array of bytes each."""
DIGEST = "adapter-digest"
"""Record of their digest."""
FILES = (
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "heads.safetensors",
    "inference.json",
)
"""All that is sent, and all that is taken."""
LARGEST = 2**30
"""Bytes of all files together."""


def read_folder(folder: Path) -> dict[str, bytes]:
    """Return the files of an adapter folder that are there, by name.

    Raises:
        OSError: one cannot be read.
    """
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}


def digest_of(files: Mapping[str, bytes]) -> str:
    """Return one SHA-256 of the files' names and contents, as hexadecimal digits."""
    total = hashlib.sha256()
    for name in sorted(files):
        total.update(f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n".encode())
    return total.hexdigest()


def check_files(files: Mapping[str, NDArray[Any]], digest: str) -> dict[str, bytes]:
    """Return the files as bytes.

    Args:
        files: as they arrived.
        digest: as the server has it.

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
