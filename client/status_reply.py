"""The replies that carry no tensors; without torch, so that they can always be sent."""

from __future__ import annotations

from flwr.app import ConfigRecord, Message, RecordDict

STATUS = "status"
"""Record that says how a request ended; its ``code`` is ``ok``, or why there is nothing else."""


def status_reply(message: Message, code: str) -> Message:
    """A reply that carries a code and nothing else."""
    return Message(RecordDict({STATUS: ConfigRecord({"code": code})}), reply_to=message)
