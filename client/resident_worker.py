"""The way to the process that stays (:mod:`client.worker_process`).

Flower starts a new process for every message. That process is light, and passes the message on
to the one that has torch, the model and the tokenised data. The first message starts it; where it
cannot be reached, the light process does the work itself.
"""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

from flwr.app import Context, Message

from client.alone import alone
from client.site_file import SiteFile
from client.status_reply import status_reply

INSIDE = "inside-worker"
"""Key of the node config, which the worker sets: here the work is done."""
START_SECONDS = 60.0
LOCK = "starting.lock"
LONGEST_PATH = 100
"""Of a socket; the system allows some 108 bytes."""
GONE = (OSError, EOFError)


def ask(site: SiteFile, message: Message, context: Context) -> Message | None:
    """Return the worker's reply; None where there is no worker to be had.

    It is waited for as long as the message is valid. After that nobody wants the reply, and who
    began the work anew would only be late for the next message: the reply is ``failed``.
    """
    address = Path(site.site.state) / "worker" / "socket"
    if not site.compute.keep_seconds or len(str(address)) > LONGEST_PATH:
        return None
    code = code_of(site)
    connection, stale = _connect(address), False
    for _ in range(2):
        if connection is None:
            connection = _start(address, code, site.compute.keep_seconds, stale)
        if connection is None:
            return None
        with connection:
            try:
                _send_within(connection, valid_for(message), (code, message, context))
                if not connection.poll(valid_for(message)):
                    return status_reply(message, "failed")
                reply = connection.recv()
            except TimeoutError:
                return status_reply(message, "failed")
            except GONE:
                return None
        if reply != "stale":
            return reply if isinstance(reply, Message) else None
        connection, stale = None, True
    return None


def _send_within(connection: Connection, seconds: float, what: object) -> None:
    """Send; a worker that is busy reads no more than the system keeps for it.

    Raises:
        TimeoutError: it has read nothing more for so long.
    """
    whole, part = divmod(seconds, 1.0)
    limit = struct.pack("ll", int(whole), int(1e6 * part) or 1)  # 0 and 0 would be no limit
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    try:
        connection.send(what)
    except BlockingIOError:
        raise TimeoutError from None


def valid_for(message: Message) -> float:
    """Seconds until the message expires; the clocks agree well enough, or nothing would arrive."""
    return max(0.0, message.metadata.created_at + message.metadata.ttl - time.time())


def code_of(site: SiteFile) -> str:
    """A name for what a worker cannot change while it runs: its code, and its device."""
    here = f"{Path(__file__).resolve()} {sys.executable} {site.compute.device}"
    return hashlib.sha256(here.encode()).hexdigest()


def _connect(address: Path) -> Connection | None:
    end = socket.socket(socket.AF_UNIX)
    try:
        end.connect(str(address))
    except OSError:
        end.close()
        return None
    return Connection(end.detach())


def _start(address: Path, code: str, keep_seconds: int, stale: bool) -> Connection | None:
    """Return a connection to a new worker, which outlives this process, or to the one that another
    process has started meanwhile; not to one of other code (``stale``), which ends."""
    with alone(address.parent, LOCK):
        address.parent.chmod(0o700)  # what is sent here is trusted
        connection = None if stale else _connect(address)
        return connection or _launch(address, code, keep_seconds)


def _launch(address: Path, code: str, keep_seconds: int) -> Connection | None:
    address.unlink(missing_ok=True)
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, os.environ.get("PYTHONPATH", "")]
    with (address.parent / "output").open("ab") as output:
        process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "client.worker_process",
                str(address),
                code,
                str(keep_seconds),
            ],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        connection = _connect(address)
        if connection is not None:
            return connection
        time.sleep(0.1)
    return None
