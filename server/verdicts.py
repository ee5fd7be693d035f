"""What sites think of new class means: where most are better off without, these are not used."""

from __future__ import annotations

from collections.abc import Sequence

from deal_core.aggregation import NUMERICAL
from deal_core.lora.state import State
from server import wire
from server.exchange import Exchange, answered
from server.schedule import Step


def found_worse(exchange: Exchange, step: Step, state: State, tasks: Sequence[str]) -> bool:
    """Return whether most clients that answer say that their own records are answered better
    without the heads of ``state``; ``tasks``: whose class means are new in it."""
    common = exchange.instruction(step, state)
    asked = common.model_copy(update={"tasks": tuple(tasks), "server_round": 0})
    sent = exchange.ask(state, asked, dict.fromkeys(exchange.roster.clients, asked))
    worse: dict[str, bool] = {}
    for reply in exchange.replies(step, sent):
        try:
            worse[reply.client] = wire.read_verdict(answered(reply))
        except wire.ClientSkipped:
            continue
        except NUMERICAL as fault:
            exchange.event("client_failed", step, client=reply.client, reason=str(fault)[:400])
    against = sum(worse.values())
    if against:
        exchange.event("class_means_doubted", step, tasks=list(tasks), by=against, of=len(worse))
    return 2 * against > len(worse)
