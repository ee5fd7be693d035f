"""The replies that carry no tensors; without torch, so that they can always be sent."""

from __future__ import annotations

from flwr.app import ConfigRecord, Message, RecordDict

from deal_core.secure_sum.messages import ProtocolError
from deal_core.wire.records import BLAMES, REPLY, SECURE

STATUS = "status"
"""Record that says how a request ended; its ``code`` is ``ok``, or why there is nothing else."""


def status_reply(message: Message, code: str) -> Message:
    """A reply that carries a code and nothing else."""
    return Message(RecordDict({STATUS: ConfigRecord({"code": code})}), reply_to=message)


def fault_reply(message: Message, code: str, error: Exception) -> Message:
    """Return a reply with the code of a fault; where a site's message of a secure sum is to blame,
    which site's. That follows from what the sites have sent, and from no record."""
    reply = status_reply(message, code)
    if code == ProtocolError.code and isinstance(error, ProtocolError) and error.site:
        reply.content.config_records[STATUS][BLAMES] = error.site.hex()
    return reply


def secure_reply(message: Message, reply: bytes) -> Message:
    """A reply of the protocol of secure sums."""
    content = RecordDict({STATUS: ConfigRecord({"code": "ok"})})
    content[SECURE] = ConfigRecord({REPLY: reply})
    return Message(content, reply_to=message)
