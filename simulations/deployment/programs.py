"""How the programs of a deployment run: Flower's in a private home with nothing phoned home, in the
foreground as a service manager wants it; and the systemd unit that keeps server or site running."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from string import Template
from types import FrameType
from typing import Any

from deal_core.errors import UserError
from server.folder import exclusive_lock, held
from simulations.engines.flower import flower_environment, program, stop_all
from simulations.output.files import toml_lines

CODE = Path(__file__).resolve().parents[2]
"""This checkout, or where it is installed."""
CONNECTION = "deal"
"""Name of the SuperLink in the private Flower configuration."""
COMMAND_SECONDS = 120.0
STOP_SECONDS = 20.0
WATCH_SECONDS = 2.0
HUNG_SECONDS = 10.0
"""How long a program may live after it has said that it cannot go on."""
PIECE = 2**16
"""Bytes of a log that are read at a time."""
HUNG = 75
"""Exit code of a program that was ended because it hung."""


@dataclass(frozen=True)
class FlowerHome:
    """A folder of Flower's own below the server's or site's."""

    path: Path

    @property
    def empty(self) -> Path:
        """Working directory: nothing in it can be imported instead of the app."""
        return self.path / "empty"

    def make(self) -> None:
        """Make the folders."""
        self.empty.mkdir(parents=True, exist_ok=True)

    def environment(self) -> dict[str, str]:
        """Return the environment for every program of Flower's; this checkout comes first among
        what it imports, but for an app, which Flower puts before it."""
        paths = os.pathsep.join(filter(None, [str(CODE), os.environ.get("PYTHONPATH")]))
        return {**flower_environment(self.path), "PYTHONPATH": paths}

    def connect(self, address: str, certificate: Path) -> None:
        """Write the connection that ``flwr`` uses."""
        self.make()
        lines = toml_lines({"address": address, "root-certificates": str(certificate)})
        (self.path / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n{lines}',
            encoding="utf-8",
        )

    def ask(self, *arguments: str) -> dict[str, Any]:
        """Return what ``flwr ARGUMENTS --format json`` says.

        Raises:
            UserError: Flower refuses, or the SuperLink does not answer.
        """
        self.make()
        command = [program("flwr"), *arguments, "--format", "json"]
        try:
            done = subprocess.run(
                command,
                cwd=self.empty,
                env=self.environment(),
                capture_output=True,
                text=True,
                timeout=COMMAND_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise UserError(
                f"flwr {arguments[0]}: no answer after {COMMAND_SECONDS:g} s; "
                "is the server running (deal server start)?"
            ) from None
        answer = _json_in(done.stdout)
        if not answer.get("success"):
            said = str(answer.get("error-message") or done.stderr or done.stdout)
            reason = " ".join(said.split())[-300:] or f"exit code {done.returncode}"
            raise UserError(
                f"flwr {arguments[0]}: {reason} (is the server running? deal server start)"
            )
        return answer


def _json_in(text: str) -> dict[str, Any]:
    """Return the JSON object in an output that may have lines before it."""
    start = text.find("{")
    try:
        found = json.loads(text[start:]) if start >= 0 else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def supervise(
    command: Sequence[str], home: FlowerHome, log: Path, pid: Path, fatal: str = ""
) -> int:
    """Start ``command``, pass on SIGINT and SIGTERM, and wait until it has ended.

    Args:
        command: the program.
        home: Flower's; gives environment and working directory.
        log: its output is appended.
        pid: holds the id of this process while it runs, and stays where it ends unasked.
        fatal: words in the log after which the program should end; where it does not, it is ended.

    Returns:
        0 if it was asked to end, else its exit code, or 1 where that is 0 (a SuperNode that is
        refused says 0).

    Raises:
        UserError: another process does this already.
    """
    home.make()
    lock = pid.with_suffix(".lock")
    if held(lock):
        raise UserError(f"{pid.parent}: runs already; end that process first (its id: {pid})")
    with exclusive_lock(lock), log.open("ab") as output:
        start = output.tell()
        process = subprocess.Popen(
            list(command),
            cwd=home.empty,
            env=home.environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            pid.write_text(f"{os.getpid()}\n")  # a full disk must leave no process behind
            with _forwarded(process) as asked:
                code = _watched(process, log, start, fatal)
            if not asked.is_set():
                return code or 1
            pid.unlink(missing_ok=True)
            return 0
        finally:
            stop_all(home.path)
            process.wait()


def _watched(process: subprocess.Popen[bytes], log: Path, start: int, fatal: str) -> int:
    """Wait for the end of the process; do not wait for ever where it hangs."""
    said, found, words = 0.0, start, fatal.encode()
    while True:
        try:
            return process.wait(WATCH_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        if words and not said:
            found = _look_for(words, log, found)
            said = time.monotonic() if found < 0 else 0.0
        if said and time.monotonic() > said + HUNG_SECONDS:
            process.kill()
            process.wait()
            return HUNG


def _look_for(words: bytes, log: Path, start: int) -> int:
    """Return -1 where the words stand behind a place of the log, and else from where to look next
    time: a log grows for weeks, and words may be half written."""
    with log.open("rb") as file:
        file.seek(start)
        rest = b""
        while piece := file.read(PIECE):
            if words in (rest := rest + piece):
                return -1
            rest = rest[-len(words) + 1 :] if len(words) > 1 else b""
        return file.tell() - len(rest)


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


def check_free(port: int, key: str) -> None:
    """Raise :class:`UserError` where another program listens on a local port already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise UserError(
                f"port {port} is in use on this machine; end what uses it, or change {key}"
            ) from None


class _Placeholders(Template):
    """``@{name}``: neither nginx nor systemd nor TOML gives it another meaning."""

    delimiter = "@"


def filled(template: str, **words: object) -> str:
    """Return a file of the folder ``templates`` with ``words`` in the places of their names."""
    text = (Path(__file__).parent / "templates" / template).read_text(encoding="utf-8")
    return _Placeholders(text).substitute(words)


def service_unit(
    what: str, name: str, arguments: str, folder: Path, fixed: Sequence[Path], changed: Path
) -> str:
    """Return the text of a systemd unit; what it runs can change nothing but its state.

    Args:
        what: one line for people.
        name: of the unit.
        arguments: of ``deal``; ``folder`` follows.
        folder: of ``deal server init`` or ``deal site init``; its owner runs the service.
        fixed: what the service may read only.
        changed: the one folder that it may write.
    """
    # Below a home the strict setting would hide the folder itself.
    homes = {Path("/home"), Path("/root")}
    places = [folder, CODE, Path(sys.executable), *fixed]
    hidden = any(homes & set(place.parents) for place in places)
    return filled(
        "unit.service",
        what=what,
        name=name,
        file=f"{name}.service",
        user=_owner(folder),
        python=_argument(sys.executable),
        arguments=f"{arguments} {_argument(folder)}",
        fixed=" ".join(_quoted(path) for path in fixed),
        changed=_quoted(changed),
        plain_folder=_percent(folder),
        environment=_quoted(f"PYTHONPATH={CODE}"),
        home="read-only" if hidden else "yes",
    )


def _owner(folder: Path) -> str:
    """Who made the folder: neither server nor site needs more than that."""
    try:
        return folder.owner()
    except KeyError:
        return str(folder.stat().st_uid)


def _quoted(value: Path | str) -> str:
    """As systemd reads it back: one word, whatever a path contains."""
    text = _percent(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


def _argument(value: Path | str) -> str:
    """Return the same in a command line, where variables are put in."""
    return _quoted(value).replace("$", "$$")


def _percent(value: Path | str) -> str:
    return str(value).replace("%", "%%")
