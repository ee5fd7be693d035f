"""A tracker beside a run: a process of its own, which reads figures and writes into a folder.

So a tracker's package, with its threads, its environment and its faults, is not in the process
that holds the model. A tracker that fails costs nothing of the run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from deal_core.config.experiment import Experiment
from deal_core.config.run_config import flatten
from deal_core.errors import UserError
from server.folder import EventLog, RunEvent
from server.tracking.run_figures import RunFigures

TRACKERS = {
    "tensorboard": ("tensorboard",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
    "trackio": ("trackio",),
}
"""Name of a tracker, of its module here and of the extra that installs it, to what it imports."""
CLOSING_SECONDS = 60.0
OFFLINE = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "HF_HUB_OFFLINE": "1"}
"""Environment of a tracker's process: it writes files, and calls nobody."""


def check_tracker(experiment: Experiment) -> None:
    """Check that the packages of ``run.track`` are installed; none is imported.

    Raises:
        UserError: one is missing.
    """
    name = experiment.run.track
    missing = [package for package in TRACKERS.get(name, ()) if find_spec(package) is None]
    if missing:
        raise UserError(
            f"run.track = '{name}' needs {', '.join(missing)}, which is not installed; run "
            f"pip install --editable '.[{name}]' in the checkout, or leave run.track out"
        )


class Tracker:
    """The process of a tracker, and what it is told.

    A thread writes to it, so that one which reads slowly, or no more, never holds up the run.
    """

    def __init__(self, name: str, folder: Path, settings: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._figures = RunFigures()
        self._log = folder / "tracker.log"
        module, run = f"server.tracking.{name}", folder.parents[1].name
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(folder), run],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                env=_environment(folder),
                start_new_session=True,  # Ctrl-C is for the run; the end of the input ends this
            )
        self._lines: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self._writer = Thread(target=self._write, daemon=True)
        self._writer.start()
        self._lines.put({"settings": settings})

    def follow(self, event: RunEvent) -> None:
        """Tell the process what an event gives."""
        if (line := self._figures.line(event)) is not None:
            self._lines.put(line)

    def close(self) -> str:
        """End the process, and wait until all is written, ``CLOSING_SECONDS`` at most.

        Returns:
            Why the tracker has failed; empty: it has not.
        """
        self._lines.put(None)
        try:
            code = self._process.wait(CLOSING_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._writer.join()
        return f"exit code {code}; see {self._log}" if code else ""

    def _write(self) -> None:
        """Write line by line, and then end the input. A process that has ended takes no more;
        :meth:`close` says why."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as stream:
            while (line := self._lines.get()) is not None:
                stream.write(json.dumps(line) + "\n")
                stream.flush()


@contextmanager
def tracked(experiment: Experiment, folder: Path, events: EventLog) -> Iterator[EventLog]:
    """Yield the log of a run, which tells the run's tracker within the block as well.

    Args:
        experiment: with ``run.resume`` the tracker goes on with what it has in the folder.
        folder: for all trackers of the run.
        events: the log; a tracker that has failed is an event in it, at the end.

    Raises:
        UserError: the tracker's package is not installed.
    """
    check_tracker(experiment)
    if experiment.run.track == "none":
        yield events
        return
    own = folder / experiment.run.track
    if not experiment.run.resume:
        shutil.rmtree(own, ignore_errors=True)  # of a start that came to no checkpoint
    tracker = Tracker(experiment.run.track, own, flatten(experiment))

    def follow(event: RunEvent) -> None:
        tracker.follow(event)
        if events.listener is not None:
            events.listener(event)

    try:
        yield replace(events, listener=follow)
    finally:
        if reason := tracker.close():
            with suppress(OSError):
                events.write("tracking_failed", tracker=experiment.run.track, reason=reason)


def _environment(folder: Path) -> dict[str, str]:
    """Return this process's environment, without what would send figures elsewhere."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRACKIO_", "MLFLOW_"))}
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, kept.get("PYTHONPATH"))))
    return {**kept, **OFFLINE, "TRACKIO_DIR": str(folder), "PYTHONPATH": path}
