"""``deal demo deployment``: the commands of a consortium, one after another, on one machine; all
processes that were started are known, and none outlives it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from rich.console import Console

from deal_core.errors import UserError
from server.folder import Listener, RunFolder, plain_reason
from simulations.deployment.demo.files import (
    NAMES,
    DemoFolder,
    new_folder,
    write_server,
    write_shares,
    write_sites,
)
from simulations.deployment.programs import CODE
from simulations.deployment.server.folder import LOCAL
from simulations.deployment.server.submit import Submission, flower_status, starts, submit
from simulations.deployment.server.superlink import add_site
from simulations.engines.flower import Tail, members, stop_all
from simulations.engines.interrupt import deferred, stoppable, uninterrupted
from simulations.output.console import print_line
from simulations.run.live_view import progress_view
from simulations.run.simulate import STOPPED

MARK = "DEAL_DEMO"
"""In the environment of everything that is started: the folder. Processes inherit it, also those
that leave their group."""
STOP_SECONDS = 20.0
POLL_SECONDS = 0.2
START_SECONDS = 90.0
RUN_SECONDS = 1200.0
"""A machine that is busy with other things may take long; none takes longer than this."""
SILENT_SECONDS = 30.0
"""After so long without an event Flower is asked whether the run has failed."""


@dataclass(frozen=True)
class DemoRequest:
    """The arguments of ``deal demo deployment``.

    Attributes:
        folder: a new one; empty: chosen below ``runs``.
        sites: two or three.
    """

    folder: str = ""
    sites: int = 3


def demo_deployment(
    request: DemoRequest, console: Console, write_page: Callable[[Path], None]
) -> int:
    """Start a server and sites on this machine, run an experiment to its end, stop all of it.

    Args:
        request: what was typed.
        console: for people.
        write_page: called with the folder of the finished run.

    Returns:
        The exit code: 0; 130 where it was stopped.

    Raises:
        UserError: the folder is there already, or something did not start or did not finish;
            nothing runs any more.
    """
    started = time.monotonic()
    folder, names = new_folder(request.folder), NAMES[: request.sites]
    try:
        with stoppable():
            run = _run(folder, names, console)
    except KeyboardInterrupt:
        print_line(console, f"stopped; nothing of it runs any more; {folder.path} may be removed")
        return STOPPED
    from simulations.run.summary import print_report

    print_report(console, run)
    write_page(run)
    for line in last_lines(folder, names[0], run, time.monotonic() - started):
        print_line(console, line)
    return 0


def last_lines(folder: DemoFolder, site: str, run: Path, seconds: float) -> list[str]:
    """Say what is there now, and what to do with it."""
    return [
        f"took {seconds:.0f} s; server and sites have ended, no process is left",
        f'next: deal predict {brief(run)} "a broken bone"',
        f"or: deal site fetch {brief(folder.site(site))} --to adapter; what server and sites have "
        "written is beside it (docs/DEPLOYMENT.md)",
    ]


def brief(word: object) -> str:
    """Return a word of a command; a path below the working directory without it."""
    here = Path.cwd()
    if isinstance(word, Path) and word.is_relative_to(here):
        return str(word.relative_to(here))
    return str(word)


def _run(folder: DemoFolder, names: Sequence[str], console: Console) -> Path:
    """Return the folder of the finished run; every process has ended."""

    def shown(*words: object) -> None:
        print_line(console, "$ deal " + " ".join(map(brief, words)))

    with console.status("dividing the embedded questions among the sites"):
        write_shares(folder, names)
    port, unused = _free_ports()
    server = folder.server
    write_server(folder, port, unused, shown)
    with stopped_at_the_end(Children(folder)) as children:
        shown("server start", server.path)
        children.start("server", "server", "start", str(server.path))
        write_sites(folder, names, port, shown)
        with console.status("waiting for the server"):
            children.wait_for("the server", lambda: _answers(port), START_SECONDS)
        for name in names:
            shown("server add-site", name, folder.site(name) / "site.pub", "--dir", server.path)
            add_site(server, name, folder.site(name) / "site.pub")
            shown("site start", folder.site(name))
            children.start(name, "site", "start", str(folder.site(name)))
        shown("submit", folder.experiment, "--dir", server.path)
        submit(server, Submission(str(folder.experiment)))
        run = next(path for path in server.runs.iterdir() if path.is_dir())
        with progress_view(console, "demo") as listener:
            follow(children, run, listener)
    return run


def follow(children: Children, run: Path, listener: Listener, seconds: float = RUN_SECONDS) -> None:
    """Hand every event of the run to the listener, until it has finished.

    Raises:
        UserError: the run stops, a process ends by itself, or it takes longer than ``seconds``.
    """
    tail, begun = Tail(RunFolder(run).metrics), time.monotonic()
    heard = begun
    while True:
        for event in tail.new():
            heard = time.monotonic()
            listener(event)
            if event["event"] == "run_finished":
                return
            if event["event"] == "run_stopped":
                raise UserError(
                    f"the run stopped: {plain_reason(event['reason'])} (its folder: {run})"
                )
        children.require_alive()
        if time.monotonic() > begun + seconds:
            raise UserError(f"the run has not finished within {seconds:g} s (its folder: {run})")
        if time.monotonic() > heard + SILENT_SECONDS:
            heard = time.monotonic()
            _require_running(children.folder, run)
        time.sleep(0.2)


def _require_running(folder: DemoFolder, run: Path) -> None:
    """Raise where Flower has given up the run, and the run could not say so."""
    begun = starts(run)
    said = flower_status(folder.server, begun[-1]["run"]) if begun else ""
    if said.startswith("finished"):
        raise UserError(f"the run has ended as '{said}'; see {folder.server.log}")


def _answers(port: int) -> bool:
    try:
        with socket.create_connection((LOCAL, port), timeout=1):
            return True
    except OSError:
        return False


def _free_ports() -> tuple[int, int]:
    """Return two ports that nobody listens on."""
    with socket.socket() as one, socket.socket() as other:
        one.bind((LOCAL, 0))
        other.bind((LOCAL, 0))
        return int(one.getsockname()[1]), int(other.getsockname()[1])


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
        paths = os.pathsep.join(filter(None, [str(CODE), os.environ.get("PYTHONPATH")]))
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
