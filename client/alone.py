"""One process at a time in a folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OWNER_ALONE = 0o600


@contextmanager
def alone(folder: Path, lock: str) -> Iterator[None]:
    """Within the block no other process, or thread, is in one of the same folder and lock. It ends
    with the process, however that ends.

    Args:
        folder: made where it is missing.
        lock: name of the file that is locked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(folder / lock, os.O_CREAT | os.O_WRONLY, OWNER_ALONE)) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
