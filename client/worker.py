"""A process that stays: it has torch, the model and the tokenised data, request after request.

Flower starts a new process for every message. That process is light, and passes the message on
to this one, which the first message starts and which ends when nobody has asked for a while.
Where it cannot be reached, the light process does the work itself.
"""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

from flwr.app import Context, Message

from client.answer import status_reply
from client.site_file import SiteFile

INSIDE = "inside-worker"
"""Key of the node config, which this process sets: here the work is done."""
START_SECONDS = 60.0
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
    connection = _connect(address)
    for _ in range(2):
        if connection is None:
            connection = _start(address, code, site.compute.keep_seconds)
        if connection is None:
            return None
        with connection:
            try:
                connection.send((code, message, context))
                if not connection.poll(_valid_for(message)):
                    return status_reply(message, "failed")
                reply = connection.recv()
            except GONE:
                return None
        if reply != "stale":
            return reply if isinstance(reply, Message) else None
        connection = None
    return None


def _valid_for(message: Message) -> float:
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


def _start(address: Path, code: str, keep_seconds: int) -> Connection | None:
    """Start a worker that outlives this process, and connect to it."""
    address.parent.mkdir(parents=True, exist_ok=True)
    address.parent.chmod(0o700)  # what is sent here is trusted
    address.unlink(missing_ok=True)
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, os.environ.get("PYTHONPATH", "")]
    with (address.parent / "output").open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "client.worker", str(address), code, str(keep_seconds)],
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


def serve(address: Path, code: str, keep_seconds: float) -> None:
    """Answer one request after another, until none has come for ``keep_seconds``, or one comes
    for other code."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen()
        listener.settimeout(keep_seconds)
        while True:
            try:
                end, _ = listener.accept()
            except TimeoutError:
                return
            with Connection(end.detach()) as connection:
                try:
                    if not _answer(connection, code):
                        return
                except GONE:  # whoever asked is dead
                    continue


def _answer(connection: Connection, code: str) -> bool:
    wanted, message, context = connection.recv()
    if wanted != code:
        connection.send("stale")
        return False
    from client.app import app

    context.node_config[INSIDE] = True
    connection.send(app(message, context))
    return True


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
