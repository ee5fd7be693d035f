"""Atomic file replacement: a temporary file, fsync, rename."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def atomic_write(path: Path, data: bytes | str, mode: int = 0o644, for_good: bool = False) -> None:
    """Replace a file in one step; its folder is made where it is missing. After a kill, or a loss
    of power, there is the old file or the new one; ``for_good``: once this returns, the new one.
    ``mode``: permissions of a new file, within the process' own mask.

    Raises:
        OSError: it cannot be written; the old one stands.
    """
    with atomic_path(path, mode) as beside, beside.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
    if for_good:
        folder = os.open(path.parent, os.O_RDONLY)  # a rename is kept there, not in the file
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def atomic_path(path: Path, mode: int = 0o644) -> Iterator[Path]:
    """Give a path to write to, which takes the place of ``path`` at the end of the block; nothing
    is left of it where the block fails.

    Yields:
        A path in the same folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.writing")
    os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode))
    try:
        yield beside
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk names no file
            error.filename = str(path)
        raise


LARGEST_LOG = 10_000_000
"""Bytes."""


def rotated(log: Path) -> Path:
    """Return a log to append to. One that has grown large becomes ``LOG.1``, in the place of the
    one before."""
    with suppress(OSError):
        if log.stat().st_size > LARGEST_LOG:
            log.replace(log.with_name(f"{log.name}.1"))
    return log
