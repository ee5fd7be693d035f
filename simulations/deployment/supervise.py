"""Run one program of Flower's in the foreground, as a service manager wants it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from deal_core.errors import UserError
from server.lock import alone
from simulations.deployment.flower_home import FlowerHome
from simulations.flower_sandbox import stop_all

STOP_SECONDS = 20.0


def supervise(command: Sequence[str], home: FlowerHome, log: Path, pid: Path) -> int:
    """Start ``command``, pass on SIGINT and SIGTERM, return its exit code when it has ended.

    Args:
        command: the program.
        home: Flower's; gives environment and working directory.
        log: its output is appended.
        pid: holds the id of this process while it runs.

    Raises:
        UserError: another process does this already.
    """
    home.make()
    with alone(pid.with_suffix(".lock")), log.open("ab") as output:
        process = subprocess.Popen(
            list(command),
            cwd=home.empty,
            env=home.environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        _forward(process)
        pid.write_text(f"{os.getpid()}\n")
        try:
            return process.wait()
        finally:
            pid.unlink(missing_ok=True)
            stop_all(home.path)
            process.wait()


def _forward(process: subprocess.Popen[bytes]) -> None:
    def stop(number: int, frame: FrameType | None) -> None:
        process.terminate()
        signal.signal(signal.SIGALRM, lambda *_: process.kill())
        signal.alarm(int(STOP_SECONDS))

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


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
