"""The processes of a demonstration: all that were started are known, and none outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from deal_core.errors import UserError
from simulations.deployment.demo.folder import DemoFolder
from simulations.engines.flower_sandbox import members, stop_all
from simulations.engines.interrupt import deferred, uninterrupted

MARK = "DEAL_DEMO"
"""In the environment of everything that is started: the folder. Processes inherit it, also those
that leave their group."""
STOP_SECONDS = 20.0
POLL_SECONDS = 0.2


@dataclass
class Children:
    """What was started here.

    Attributes:
        folder: of the demonstration.
        program: what is started, arguments follow.
        patience: seconds between the wish that they end and the end.
        started: name to process.
    """

    folder: DemoFolder
    program: Sequence[str] = (sys.executable, "-P", "-m", "simulations.cli")
    patience: float = STOP_SECONDS
    started: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, *arguments: str) -> None:
        """Start ``deal ARGUMENTS``; what it prints goes to the folder."""
        code = str(Path(__file__).resolve().parents[3])
        paths = os.pathsep.join(filter(None, [code, os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": paths, MARK: str(self.folder.path)}
        with deferred(), self.folder.output(name).open("ab") as output:
            self.started[name] = subprocess.Popen(
                [*self.program, *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal is for us alone
            )

    def require_alive(self) -> None:
        """Raise :class:`UserError` where one has ended by itself."""
        for name, process in self.started.items():
            if process.poll() is not None:
                output = self.folder.output(name)
                said = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                last = said[-1] if said else "it said nothing"
                raise UserError(f"'{name}' has ended by itself: {last} (log: {output})")

    def wait_for(self, what: str, condition: Callable[[], bool], seconds: float) -> None:
        """Wait until the condition holds.

        Raises:
            UserError: it does not in that time, or a process has ended by itself.
        """
        end = time.monotonic() + seconds
        while not condition():
            self.require_alive()
            if time.monotonic() > end:
                raise UserError(f"{what}: not within {seconds:g} s; logs are in {self.folder.path}")
            time.sleep(POLL_SECONDS)

    def alive(self) -> list[psutil.Process]:
        """Return all processes that carry the mark: those started here, and those they started."""
        return members(self.folder.path, MARK)

    def stop(self) -> None:
        """Ask sites and then the server to end, wait, and end what is left.

        Raises:
            UserError: something runs even then.
        """
        for process in reversed(self.started.values()):
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        end = time.monotonic() + self.patience
        while self.alive() and time.monotonic() < end:
            for process in self.started.values():
                process.poll()
            time.sleep(POLL_SECONDS)
        stop_all(self.folder.path, MARK)
        for process in self.started.values():
            process.wait()
        if left := self.alive():
            numbers = ", ".join(str(process.pid) for process in left)
            raise UserError(f"still running: {numbers}; end them with kill -9")


@contextmanager
def stopped_at_the_end(children: Children) -> Iterator[Children]:
    """Yield what starts processes; at the end of the block, however it is left, all are stopped."""
    try:
        yield children
    finally:
        with uninterrupted():
            children.stop()
