"""The files of a run folder, one writer for it, and its log of events: one JSON object a line, for
people, progress views and scripts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


RunEvent = dict[str, Any]
Listener = Callable[[RunEvent], None]


ROUND_OVER = ("round_finished", "round_skipped")
PLAYED = ("client_finished", "loss_summed", *ROUND_OVER)
"""Events that a round has again when it is played again."""
TOLD_TO_END = "its process was told to end"
"""Why a run stopped that was ended from outside, in the place of the name of an exception."""


@dataclass(frozen=True)
class EventLog:
    """Appends events to ``path`` and hands each to ``listener``."""

    path: Path
    listener: Listener | None = None

    def mend(self) -> None:
        """Drop a last line that a crash has cut off: what follows it could not be read."""
        if not self.path.exists():
            return
        with self.path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)

    def write(self, event: str, **fields: Any) -> None:
        """Append one event; the line is complete before the listener sees it."""
        record = {"event": event, "time": time.time(), **fields}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.listener is not None:
            self.listener(record)


def read_events(path: Path) -> list[RunEvent]:
    """Return the complete lines of ``metrics.jsonl``; none where there is no file yet."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def site_name(client: str, sites: Sequence[str]) -> str:
    """Return the name of the site that is a client; in a simulation, where there are none, the
    client's number."""
    return sites[int(client)] if client.isdigit() and int(client) < len(sites) else client


def plain_reason(reason: object) -> str:
    """Return why a run stopped on one line, without the name of the error."""
    if str(reason).startswith("SystemExit"):
        return TOLD_TO_END
    return str(reason).partition("\n")[0].removeprefix("UserError: ").strip()


def without_undone(events: Iterable[RunEvent]) -> list[RunEvent]:
    """Return the events without rounds that a crash undid after they had ended: a resumed run
    plays them again."""
    kept: list[RunEvent] = []
    for event in events:
        if event["event"] == "run_started":
            kept = _first_rounds(kept, int(event["done_rounds"]))
        kept.append(event)
    return kept


def _first_rounds(events: Iterable[RunEvent], rounds: int) -> list[RunEvent]:
    kept, over = [], 0
    for event in events:
        if over < rounds or event["event"] not in PLAYED:
            kept.append(event)
        over += event["event"] in ROUND_OVER
    return kept
