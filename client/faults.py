"""What becomes of a fault: a code for the server, and the rest for the log of the site."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Message

from client.context import here, log_of
from client.distilled_store import DistilledMissing
from deal_core.lora.payload import PayloadError
from deal_core.privacy.policy import OutsidePolicy, Refusal
from deal_core.secure_sum.messages import ProtocolError

if TYPE_CHECKING:
    from deal_core.privacy.interface import Counts

log = logging.getLogger(__name__)
TOLD = ("task", "stage", "phase", "server_round")
"""Of an instruction, what the site's log repeats."""
FAULTS = frozenset({"failed", "refused"})
"""Codes of what went wrong; the others are a client's own refusals."""
OWN_RULES = (Refusal, OutsidePolicy, DistilledMissing)
"""By which a site declines a request, or asks for it once more: nothing went wrong."""


def log_fault(message: Message, context: Context, error: Exception) -> str:
    """Return the code of a fault, or of a refusal, which is all that leaves; the log here has the
    rest."""
    code, own = code_of(error), log_of(context)
    if own is not None:
        note = own.refusal if isinstance(error, OWN_RULES) else own.fault
        note(f"request_{code}", error, **log_fields(message))
    elif code in FAULTS:
        log.error("request answered with '%s'", code, exc_info=error)
    else:  # by the client's own rules: nothing went wrong, and the run's own output says so
        log.info("client %s takes no part (%s): %s", here(context).client, code, error)
    return code


def code_of(error: Exception) -> str:
    """Return the fixed word for a fault, or for a site's own refusal (a policy, a budget, no
    data)."""
    if isinstance(error, PayloadError):
        return "refused"
    if isinstance(error, DistilledMissing):
        return "resend"
    if isinstance(error, OutsidePolicy):
        return "policy"
    return error.code if isinstance(error, (Refusal, ProtocolError)) else "failed"


def log_fields(message: Message) -> dict[str, Any]:
    """Return what a request is about, for the site's log."""
    records = message.content.config_records if message.has_content() else {}
    instruction: Mapping[str, Any] = records.get("instruction", {})
    about = {key: str(instruction[key])[:100] for key in TOLD if key in instruction}
    return {"asked": message.metadata.message_type, **about}


def counts_or_error(
    message: Message, context: Context, count: Callable[[], Counts]
) -> tuple[str, Counts]:
    """Return a code, and the counts that a training request asks for as well (none after a fault):
    whatever becomes of them, the client trains."""
    try:
        return "ok", count()
    except Exception as error:
        return log_fault(message, context, error), {}
