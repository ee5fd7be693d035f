"""Server and site as services: one of Flower's programs in the foreground, as a service manager
wants it, and the systemd unit that keeps it running."""

from __future__ import annotations

import ctypes
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from string import Template
from types import FrameType

from deal_core.atomic_write import rotated
from deal_core.errors import UserError
from server.folder import exclusive_lock, held, holder
from simulations.engines.flower import CODE, LOCAL, FlowerHome, stop_all

PR_SET_PDEATHSIG = 1
"""Of Linux's ``prctl.h``."""
COLOUR = re.compile(rb"\x1b\[[0-9;]*m")
STOP_SECONDS = 20.0
WATCH_SECONDS = 2.0
HUNG_SECONDS = 10.0
"""How long a program may live after it has said that it cannot go on."""
HUNG = 75
"""Exit code of a program that was ended because it hung."""


def supervise(
    command: Sequence[str], home: FlowerHome, log: Path, pid: Path, fatal: str = ""
) -> int:
    """Start ``command``, pass on SIGINT and SIGTERM, and wait until it has ended.

    Args:
        command: the program.
        home: Flower's; gives environment and working directory.
        log: its output is appended, without colours.
        pid: holds the id of this process while it runs, and stays where it ends unasked.
        fatal: words in the log after which the program should end; where it hangs, it is ended.

    Returns:
        0 if it was asked to end, else its exit code, or 1 where that is 0 (a SuperNode that is
        refused says 0).

    Raises:
        UserError: another process does this already.
    """
    require_idle(pid)
    with exclusive_lock(pid.with_suffix(".lock")):
        rotated(log).touch()
        process = subprocess.Popen(
            list(command),
            cwd=home.empty,
            env=home.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=dying_with(os.getpid()),
        )
        hopeless = threading.Event()
        writer = threading.Thread(
            target=_write_log, args=(process, log, fatal.encode(), hopeless), daemon=True
        )
        writer.start()
        try:
            pid.write_text(f"{os.getpid()}\n")  # a full disk must leave no process behind
            with _forwarded(process) as asked:
                code = _watched(process, hopeless)
            if not asked.is_set():
                return code or 1
            pid.unlink(missing_ok=True)
            return 0
        finally:
            stop_all(home.path)
            process.wait()
            writer.join(STOP_SECONDS)


def require_idle(pid: Path, port: int = 0) -> None:
    """Check that no process does what is about to begin, or listens on its local port (0: none).

    Raises:
        UserError: one does; the message names it.
    """
    if held(lock := pid.with_suffix(".lock")):
        raise UserError(f"{pid.parent}: runs already{holder(lock)}; end that process first")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind((LOCAL, port))
        except OSError:
            raise UserError(
                f"port {port} is in use{holder(port=port)}; end that process, or set another "
                "superlink_port in server.toml"
            ) from None


def dying_with(parent: int) -> Callable[[], None] | None:
    """Return what a child does first: it asks the kernel for SIGTERM as soon as its parent has
    ended, however that was. None where there is no such kernel."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, kill = ctypes.CDLL(None).prctl, os.kill

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it has ended meanwhile
            kill(os.getpid(), signal.SIGTERM)

    return ask


def _write_log(
    process: subprocess.Popen[bytes], log: Path, fatal: bytes, hopeless: threading.Event
) -> None:
    """Write what the process says into its log, without colours; the event tells of ``fatal``
    words. A disk that takes no more costs lines, and not the process."""
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            if fatal and fatal in line:
                hopeless.set()
            with suppress(OSError), rotated(log).open("ab") as file:
                file.write(COLOUR.sub(b"", line))


def _watched(process: subprocess.Popen[bytes], hopeless: threading.Event) -> int:
    """Wait for the end of the process; one that hangs after its fatal words is ended."""
    deadline = math.inf
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(WATCH_SECONDS)
        if hopeless.is_set():
            deadline = min(deadline, time.monotonic() + HUNG_SECONDS)
        if time.monotonic() > deadline:
            process.kill()
            process.wait()
            return HUNG


@contextmanager
def _forwarded(process: subprocess.Popen[bytes]) -> Iterator[threading.Event]:
    """Within the block signals go to the process; the event tells that one has come."""
    asked = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        asked.set()
        process.terminate()
        signal.signal(signal.SIGALRM, lambda *_: process.kill())
        signal.alarm(int(STOP_SECONDS))

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)


class _Placeholders(Template):
    """``@{name}``: neither nginx nor systemd nor TOML gives it another meaning."""

    delimiter = "@"


def filled(template: str, **words: object) -> str:
    """Return a file of the folder ``templates`` with ``words`` in the places of their names."""
    text = (Path(__file__).parent / "templates" / template).read_text(encoding="utf-8")
    return _Placeholders(text).substitute(words)


def service_unit(side: str, folder: Path, fixed: Sequence[Path], changed: Path) -> str:
    """Return the text of a systemd unit; what it runs can change nothing but its state.

    Args:
        side: ``server`` or ``site``.
        folder: of ``deal server init`` or ``deal site init``; its owner runs the service.
        fixed: what the service may read only.
        changed: the one folder that it may write.
    """
    # Below a home the strict setting would hide the folder itself.
    homes = {Path("/home"), Path("/root")}
    places = [folder, CODE, Path(sys.executable), *fixed]
    hidden = any(homes & set(place.parents) for place in places)
    try:
        owner = folder.owner()
    except KeyError:
        owner = str(folder.stat().st_uid)
    return filled(
        "unit.service",
        side=side,
        user=owner,
        python=_argument(sys.executable),
        folder=_argument(folder),
        fixed=" ".join(_quoted(path) for path in fixed),
        changed=_quoted(changed),
        plain_folder=_percent(folder),
        environment=_quoted(f"PYTHONPATH={CODE}"),
        home="read-only" if hidden else "yes",
    )


def _quoted(value: Path | str) -> str:
    """Quote a path, so that systemd reads it as one word."""
    text = _percent(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


def _argument(value: Path | str) -> str:
    """Return the same in a command line, where variables are put in."""
    return _quoted(value).replace("$", "$$")


def _percent(value: Path | str) -> str:
    return str(value).replace("%", "%%")
