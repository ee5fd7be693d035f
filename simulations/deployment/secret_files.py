"""Private keys on disk: only their owner may read them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from deal_core.errors import UserError


def write_secret(path: Path, data: bytes) -> None:
    """Write a new file that only its owner can read; it is never readable by others, not even
    for a moment.

    Raises:
        UserError: there is such a file, or it cannot be written.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise UserError(f"{path}: there is a key already; keep it, or move it away") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    with os.fdopen(handle, "wb") as file:
        file.write(data)


def check_secret(path: Path) -> None:
    """Check that a private key is there, and for its owner alone.

    Raises:
        UserError: it is missing, or others can read it.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such key; deal site init makes one, or restore your backup")
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise UserError(f"{path}: others can read this private key; run chmod 600 {path}")
