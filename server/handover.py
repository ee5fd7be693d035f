"""The end of a deployed run: every site that is connected is sent the adapter folder, in the run's
last message. Sites only call out, so there is no later moment, and no other way, to reach them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from deal_core.lora.payload import PayloadError
from deal_core.wire.adapter_files import DIGEST, RECORD, digest_of, read_folder
from server.events import EventLog
from server.reply_collection import Reply, collect
from server.roster import Roster
from server.wire import status

KIND = f"{MessageType.QUERY}.adapter"
SECONDS = 120.0
"""How long the run waits for sites to say that they have it; who does not can be given it by
hand."""


def hand_over(grid: Grid, roster: Roster, folder: Path, events: EventLog, seconds: float) -> None:
    """Send the files of an adapter folder, and note who has them. Results are written by now: what
    goes wrong here is an event, and no reason for the run to fail.

    Args:
        grid: to the sites.
        roster: of the run.
        folder: of the adapter.
        events: ``adapter_sent`` with the digest and the clients that have it, by number; and
            ``adapter_missing`` for each that has not.
        seconds: how long to wait, at most ``SECONDS``.
    """
    try:
        files = read_folder(folder)
        digest = digest_of(files)
        nodes = dict(roster.connected())
        within = min(seconds, SECONDS)
        content = _content(files, digest)
        requests = {n: Message(content, node, KIND, ttl=within) for n, node in nodes.items()}
        faults = {r.client: _fault(r) for r in collect(grid, requests, within) if not r.dropped}
    except Exception as error:
        events.write("adapter_missing", reason=f"{type(error).__name__}: {error}"[:500])
        return
    have = [name for name in roster.clients if faults.get(name) == ""]
    events.write("adapter_sent", sha256=digest, clients=have)
    for name in roster.clients:
        if name not in have:
            reason = faults.get(name, "not connected")
            events.write("adapter_missing", client=name, reason=reason)


def _content(files: dict[str, bytes], digest: str) -> RecordDict:
    arrays = {name: Array(np.frombuffer(data, np.uint8)) for name, data in files.items()}
    return RecordDict({RECORD: ArrayRecord(arrays), DIGEST: ConfigRecord({"sha256": digest})})


def _fault(reply: Reply) -> str:
    """Return why a site has no adapter; empty: it has."""
    if reply.message is None:
        return reply.fault
    try:
        code = status(reply.message)
    except PayloadError as fault:
        return str(fault)
    return "" if code == "ok" else f"site reports {code[:40]!r}"
