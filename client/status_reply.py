"""The replies that carry no tensors; without torch, so that they can always be sent."""

from __future__ import annotations

from flwr.app import ConfigRecord, Message, RecordDict

from deal_core.wire.secure_record import REPLY, SECURE

STATUS = "status"
"""Record that says how a request ended; its ``code`` is ``ok``, or why there is nothing else."""


def status_reply(message: Message, code: str) -> Message:
    """A reply that carries a code and nothing else."""
    return Message(RecordDict({STATUS: ConfigRecord({"code": code})}), reply_to=message)


def secure_reply(message: Message, reply: bytes) -> Message:
    """A reply of the protocol of secure sums."""
    content = RecordDict({STATUS: ConfigRecord({"code": "ok"})})
    content[SECURE] = ConfigRecord({REPLY: reply})
    return Message(content, reply_to=message)
