"""A process that stays: it has torch, the model and the tokenised data, request after request.

Flower starts a new process for every message. That process is light, and passes the message on
to the one that stays. The first message starts it, and it ends when nobody has asked for a while;
where it cannot be reached, the light process does the work itself.
"""

import hashlib
import os
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.identity import status_reply
from client.site_file import SiteFile
from client.state import alone
from deal_core.atomic_write import rotated
from deal_core.installed import import_path
from deal_core.wire.records import LATE_SECONDS

INSIDE = "inside-worker"
"""Key of the node config, which the worker sets: here the work is done."""
START_SECONDS = 60.0
LONGEST_PATH = 100
"""Of a socket; the system allows some 108 bytes."""
GONE = (OSError, EOFError)


def ask(site: SiteFile, message: Message, context: Context) -> Message | None:
    """Return the worker's reply; None where there is no worker to be had.

    It is waited for as long as the message is valid. After that nobody wants the reply, and who
    began the work anew would only be late for the next message: the reply is ``failed``.
    """
    # What a worker cannot change while it runs, its code and its device, is in the socket's name.
    here = f"{Path(__file__).resolve()} {sys.executable} {site.compute.device}"
    name = hashlib.sha256(here.encode()).hexdigest()[:8]
    address = Path(site.site.state) / "worker" / name
    if not site.compute.keep_seconds or len(str(address)) > LONGEST_PATH:
        return None
    connection = _connect(address) or _start(address, site.compute.keep_seconds)
    if connection is None:
        return None
    with connection:
        try:
            _send_within(connection, valid_for(message), (message, context))
            if not connection.poll(valid_for(message)):
                return status_reply(message, "failed")
            reply = connection.recv()
        except TimeoutError:
            return status_reply(message, "failed")
        except GONE:
            return None
    return reply if isinstance(reply, Message) else None


def _send_within(connection: Connection, seconds: float, what: object) -> None:
    """Send; TimeoutError where a busy worker has read nothing more for so long."""
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


def time_left(message: Message) -> float:
    """Seconds until the deadline of a request to train or evaluate; then nobody takes its reply."""
    metadata = message.metadata
    return metadata.created_at + metadata.ttl - LATE_SECONDS - time.time()


def _connect(address: Path) -> Connection | None:
    end = socket.socket(socket.AF_UNIX)
    try:
        end.connect(str(address))
    except OSError:
        end.close()
        return None
    return Connection(end.detach())


def _start(address: Path, keep_seconds: int) -> Connection | None:
    """Return a connection to a new worker, which outlives this process, or to the one that another
    process has started meanwhile."""
    with alone(address.parent, "starting.lock"):
        address.parent.chmod(0o700)  # what is sent here is trusted
        connection = _connect(address)
        if connection is not None:
            return connection
        address.unlink(missing_ok=True)
        with rotated(address.parent / "output").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "client.app", str(address), str(keep_seconds)],
                env={**os.environ, "PYTHONPATH": import_path()},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        end = time.monotonic() + START_SECONDS
        while connection is None and process.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
            connection = _connect(address)
        return connection


def serve(app: ClientApp, address: Path, keep_seconds: float) -> None:
    """Answer one request after another, until none has come for ``keep_seconds``."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen()
        listener.settimeout(keep_seconds)
        while True:
            try:
                end, _ = listener.accept()
            except TimeoutError:
                return
            with suppress(*GONE), Connection(end.detach()) as connection:  # whoever asked is dead
                answer(app, connection)


def answer(app: ClientApp, connection: Connection) -> None:
    """Answer the request that waits."""
    message, context = connection.recv()
    context.node_config[INSIDE] = True
    late = time_left(message) <= 0  # nobody would take what was charged for it
    connection.send(status_reply(message, "failed") if late else app(message, context))
