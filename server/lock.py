"""One writer for a run folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from deal_core.errors import UserError

OTHER_OUT = "wait until it has ended, or choose another --out"
PATIENCE = 0.5
"""Seconds for which somebody may look whether a lock is held."""


@contextmanager
def exclusive_lock(lock: Path, cure: str = OTHER_OUT) -> Iterator[None]:
    """Make the folder of ``lock``; within the block no other process holds the lock.

    The kernel lets go of it when the process ends, however it ends; the empty file stays.

    Args:
        lock: the file.
        cure: what to do where another process holds it.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """
    held = FileLock(lock, timeout=PATIENCE)  # who only looks lets go at once
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except Timeout:
        raise UserError(f"{lock.parent}: another process is writing this run; {cure}") from None
    except OSError as error:
        raise UserError(
            f"{lock.parent}: cannot be written ({error.strerror}); choose another --out"
        ) from None
    try:
        yield
    finally:
        held.release()


def held(lock: Path) -> bool:
    """Whether some process holds the lock now."""
    if not lock.exists():
        return False
    probe = FileLock(lock, timeout=0)
    try:
        probe.acquire()
    except Timeout:
        return True
    probe.release()
    return False
