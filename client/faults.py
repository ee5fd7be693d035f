"""What becomes of a fault: a code for the server, and the rest for the log of the site. An
exception's text may hold private data."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict

from client.site_file import SiteLog
from client.state import RetainedMissing
from deal_core.lora.payload import PayloadError
from deal_core.privacy.policy import OutsidePolicy, Refusal
from deal_core.secure_sum.messages import ProtocolError
from deal_core.wire.records import BLAMES

log = logging.getLogger(__name__)
STATUS = "status"
"""Record that says how a request ended; its ``code`` is ``ok``, or why there is nothing else."""
FAULTS = frozenset({"failed", "refused"})
"""Codes of what went wrong; the others are a client's own refusals."""
OWN_RULES = (Refusal, OutsidePolicy, RetainedMissing)
"""By which a site declines a request, or asks for it once more: nothing went wrong."""


def log_fault(message: Message, error: Exception, own: SiteLog | None, client: object) -> str:
    """Return the code of a fault, or of a refusal, which is all that leaves; the log here has the
    rest.

    Args:
        message: the request.
        error: what it ended with.
        own: the site's log; None: the client is simulated.
        client: its number.
    """
    code = code_of(error)
    if own is not None:
        note = own.refusal if isinstance(error, OWN_RULES) else own.fault
        note(f"request_{code}", error, **log_fields(message))
    elif code in FAULTS:
        log.error("request answered with '%s'", code, exc_info=error)
    else:  # by the client's own rules: nothing went wrong, and the run's own output says so
        log.info("client %s takes no part (%s): %s", client, code, error)
    return code


def code_of(error: Exception) -> str:
    """Return the fixed word for a fault, or for a site's own refusal (a policy, a budget, no
    data)."""
    if isinstance(error, PayloadError):
        return "refused"
    if isinstance(error, RetainedMissing):
        return "resend"
    if isinstance(error, OutsidePolicy):
        return "policy"
    return error.code if isinstance(error, (Refusal, ProtocolError)) else "failed"


def log_fields(message: Message) -> dict[str, Any]:
    """Return what a request is about, for the site's log."""
    records = message.content.config_records if message.has_content() else {}
    instruction: Mapping[str, Any] = records.get("instruction", {})
    known = ("task", "stage", "phase", "server_round")
    about = {key: str(instruction[key])[:100] for key in known if key in instruction}
    return {"asked": message.metadata.message_type, **about}


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
