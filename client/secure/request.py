"""The record of a secure sum in a server's message, as the client reads it."""

from __future__ import annotations

from flwr.app import ConfigRecord, Message

from deal_core.lora.payload import PayloadError
from deal_core.wire.secure_record import ANNOUNCEMENTS, NAMES, REQUEST, RUN, SECURE


def run_of(message: Message) -> str:
    """Return the name of the run that a client is asked to announce itself for.

    Raises:
        PayloadError: there is none.
    """
    run = _record(message).get(RUN)
    if not isinstance(run, str) or not run:
        raise PayloadError("secure: no name of a run")
    return run


def request_of(message: Message) -> bytes:
    """Return the protocol's own request.

    Raises:
        PayloadError: there is none.
    """
    return _bytes(_record(message).get(REQUEST))


def announcements_of(message: Message) -> list[tuple[str, bytes]]:
    """Return what the server calls each site of a round, and that site's announcement.

    Raises:
        PayloadError: there are none.
    """
    record = _record(message)
    names, announced = _list(record.get(NAMES)), _list(record.get(ANNOUNCEMENTS))
    if len(names) != len(announced):
        raise PayloadError("secure: not one name for each announcement")
    return [(str(name), _bytes(data)) for name, data in zip(names, announced, strict=True)]


def _record(message: Message) -> ConfigRecord:
    records = message.content.config_records if message.has_content() else {}
    if SECURE not in records:
        raise PayloadError("secure: no such record")
    return records[SECURE]


def _bytes(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise PayloadError("secure: no bytes")
    return value


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise PayloadError("secure: no list")
    return value
