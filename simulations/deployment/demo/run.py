"""``deal demo deployment``: the commands of a consortium, one after another, on one machine."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from deal_core.errors import UserError
from server.events import Listener, plain_reason
from server.folder import RunFolder
from simulations.deployment.demo.children import Children, stopped_at_the_end
from simulations.deployment.demo.folder import NAMES, DemoFolder, new_folder
from simulations.deployment.server.init import LOCAL
from simulations.deployment.server.site_registry import add_site
from simulations.deployment.server.submit import Submission, starts, submit
from simulations.engines.flower import Tail
from simulations.engines.interrupt import stoppable
from simulations.output.console import print_line
from simulations.run.live_view import progress_view
from simulations.run.simulate import STOPPED

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
    from simulations.deployment.demo.files import write_server, write_sites
    from simulations.deployment.demo.shares import write_shares

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
    from simulations.deployment.server.flower_status import flower_status

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
