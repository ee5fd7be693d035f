"""A process that stays: it has torch, the model and the tokenised data, request after request.

It is started by :mod:`client.resident_worker`, and ends when nobody has asked for a while.
"""

from __future__ import annotations

import socket
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from client.app import app
from client.resident_worker import GONE, INSIDE, valid_for
from client.status_reply import status_reply


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
    context.node_config[INSIDE] = True
    stale = valid_for(message) <= 0  # it waited too long: nobody would take what was charged for it
    connection.send(status_reply(message, "failed") if stale else app(message, context))
    return True


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
