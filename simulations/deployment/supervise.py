"""Run one program of Flower's in the foreground, as a service manager wants it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from deal_core.errors import UserError
from server.lock import exclusive_lock, held
from simulations.deployment.flower_home import FlowerHome
from simulations.engines.flower_sandbox import stop_all

STOP_SECONDS = 20.0
WATCH_SECONDS = 2.0
HUNG_SECONDS = 10.0
"""How long a program may live after it has said that it cannot go on."""
PIECE = 2**16
"""Bytes of a log that are read at a time."""
HUNG = 75
"""Exit code of a program that was ended because it hung."""


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
