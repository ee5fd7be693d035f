"""The files of a run folder, and one writer for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


def previous_checkpoint(checkpoint: Path) -> Path:
    """Return where the checkpoint before the last one is kept."""
    return checkpoint.with_suffix(".previous")


@dataclass(frozen=True)
class RunFolder:
    """Names inside one run's folder."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        """State after the last finished step."""
        return self.path / "checkpoint.safetensors"

    @property
    def previous(self) -> Path:
        """The checkpoint before the last one."""
        return previous_checkpoint(self.checkpoint)

    @property
    def can_resume(self) -> bool:
        """There is a checkpoint, the last or the one before it."""
        return self.checkpoint.exists() or self.previous.exists()

    @property
    def data_record(self) -> Path:
        """What the rows were when the run was started (simulations)."""
        return self.path / "data.json"

    @property
    def writing(self) -> Path:
        """Locked by the server that writes here."""
        return self.path / ".writing.lock"

    @property
    def launching(self) -> Path:
        """Locked by the ``deal`` that started it, perhaps in another process."""
        return self.path / ".launching.lock"

    @property
    def holds_run(self) -> bool:
        """Whether a run has begun here, which another must not overwrite."""
        return self.can_resume or self.results.exists()

    @property
    def metrics(self) -> Path:
        """One event a line."""
        return self.path / "metrics.jsonl"

    @property
    def tracking(self) -> Path:
        """A folder for each tracker (``run.track``)."""
        return self.path / "tracking"

    @property
    def results(self) -> Path:
        """Written once, when the run has finished."""
        return self.path / "results.json"

    @property
    def adapter(self) -> Path:
        """The learnt adapter in PEFT's format."""
        return self.path / "adapter"
