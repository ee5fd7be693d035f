"""The files of a run folder, one writer for it, its log of events (one JSON object a line, for
people, progress views and scripts), and TensorBoard, which may follow it. A tracker that fails
costs nothing of the run."""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from deal_core.config.experiment import Experiment
from deal_core.config.file import flatten
from deal_core.errors import UserError

OTHER_OUT = "wait until it has ended, or choose another --out"
PATIENCE = 0.5
"""Seconds for which another process may look whether a lock is held."""


@contextmanager
def exclusive_lock(lock: Path, cure: str = OTHER_OUT) -> Iterator[None]:
    """Make the folder of ``lock``; within the block no other process holds the lock. The kernel
    lets go of it when the process ends, however it ends; the empty file stays.

    Raises:
        UserError: another process holds it (with its ``cure``), or the folder cannot be written.
    """
    held = FileLock(lock, timeout=PATIENCE)  # who only looks lets go at once
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except Timeout:
        raise UserError(
            f"{lock.parent}: another process is writing this run{holder(lock)}; {cure}"
        ) from None
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


def holder(lock: Path | None = None, port: int = 0) -> str:
    """Return `` (process 7: COMMAND)`` of the first process that has a lock open, or listens on a
    local ``port``; empty: nobody may say who."""
    import psutil

    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            opened = any(file.path == str(lock) for file in process.open_files()) if lock else False
            listens = any(
                c.laddr and c.laddr.port == port and c.status == psutil.CONN_LISTEN
                for c in (process.net_connections() if port else ())
            )
            if opened or listens:
                words = " ".join(process.cmdline()).split()
                return f" (process {process.pid}: {' '.join(words)[:100]})"
    return ""


def previous_checkpoint(checkpoint: Path) -> Path:
    """Return where the checkpoint before the last one is kept."""
    return checkpoint.with_suffix(".previous")


class RunFolder:
    """Names inside one run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "checkpoint.safetensors"  # state after the last finished step
        self.previous = previous_checkpoint(self.checkpoint)
        self.row_hashes = path / "rows.json"  # when the run was started (simulations)
        self.metrics = path / "metrics.jsonl"  # one event a line
        self.results = path / "results.json"  # written once, when the run has finished
        self.adapter = path / "adapter"  # in PEFT's format
        self.tracking = path / "tracking"  # a folder for each tracker (run.track)
        self.writing = path / ".writing.lock"  # held by the server that writes here
        self.launching = path / ".launching.lock"  # by the deal that started it, in any process

    @property
    def can_resume(self) -> bool:
        """There is a checkpoint, the last or the one before it."""
        return self.checkpoint.exists() or self.previous.exists()

    @property
    def holds_run(self) -> bool:
        """Whether a run has begun here, which another must not overwrite."""
        return self.can_resume or self.results.exists()


RunEvent = dict[str, Any]
Listener = Callable[[RunEvent], None]


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
    events = []
    for line in text.splitlines(keepends=True):
        with suppress(ValueError):  # a full disk has cut one off
            events += [json.loads(line)] if line.endswith("\n") else []
    return events


def site_name(client: str, sites: Sequence[str]) -> str:
    """Return the name of the site that is a client; in a simulation, where there are none, the
    client's number."""
    return sites[int(client)] if client.isdigit() and int(client) < len(sites) else client


def plain_reason(reason: object) -> str:
    """Return why a run stopped on one line, without the name of the error."""
    if str(reason).startswith("SystemExit"):
        return TOLD_TO_END
    return str(reason).partition("\n")[0].removeprefix("UserError: ").strip()


OF_A_ROUND = ("seconds", "clients", "aggregation_error", "bytes_up", "bytes_down")
OF_A_RUN = ("average_accuracy", "backward_transfer", "forward_transfer", "forgetting")
FIGURES = {"round_finished": ("round", OF_A_ROUND), "run_finished": ("final", OF_A_RUN)}
"""Event to the folder of its figures, and which of its fields are drawn."""


def check_tracker(experiment: Experiment) -> None:
    """Check that the package of ``run.track`` is installed; it is not imported.

    Raises:
        UserError: it is missing.
    """
    name = experiment.run.track
    if name != "none" and find_spec(name) is None:
        raise UserError(
            f"run.track = '{name}' needs {name}, which is not installed; run "
            f"pip install --editable '.[{name}]' in the checkout, or leave run.track out"
        )


def figures_of(event: RunEvent) -> dict[str, float]:
    """Return what of an event is drawn; epsilon is in the report, with what it means."""
    kind, drawn = event["event"], dict[str, float | None]()
    if kind in FIGURES:
        place, names = FIGURES[kind]
        drawn = {f"{place}/{name}": event.get(name) for name in names}
    elif kind in ("client_finished", "loss_summed"):
        drawn = {f"loss/{event.get('client', 'sum')}": event.get("loss")}
    elif kind == "evaluated":
        for place, field in (
            ("accuracy", "accuracy"),
            ("accuracy_all_labels", "class_incremental"),
        ):
            drawn |= {f"{place}/{task}": value for task, value in event.get(field, {}).items()}
    return {name: float(value) for name, value in drawn.items() if value is not None}


@contextmanager
def tracked(experiment: Experiment, folder: Path, events: EventLog) -> Iterator[EventLog]:
    """Yield the log of a run, which its tracker follows within the block. A tracker that fails is
    an event in the log, and hears no more. With ``run.resume`` it goes on with what ``folder`` has.

    Raises:
        UserError: the tracker's package is not installed.
    """
    check_tracker(experiment)
    name = experiment.run.track
    if name == "none":
        yield events
        return
    from torch.utils.tensorboard import SummaryWriter

    if not experiment.run.resume:
        shutil.rmtree(folder / name, ignore_errors=True)  # of a start that came to no checkpoint
    writer: Any = SummaryWriter(str(folder / name), flush_secs=10)
    lines = (f"    {key} = {value}" for key, value in flatten(experiment).items())
    writer.add_text("settings", "\n".join(lines))
    failed, done = False, 0

    def follow(event: RunEvent) -> None:
        nonlocal failed, done
        if events.listener is not None:
            events.listener(event)
        done = event.get("round", done)
        step = 0 if event.get("stage", 0) < 0 else done  # the start, before anything is learnt
        try:
            for place, value in ({} if failed else figures_of(event)).items():
                writer.add_scalar(place, value, step)
        except Exception as error:
            failed = True
            with suppress(OSError):
                events.write("tracking_failed", tracker=name, reason=f"{error!r}"[:500])

    try:
        yield replace(events, listener=follow)
    finally:
        with suppress(Exception):
            writer.close()
