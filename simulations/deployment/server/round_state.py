"""A round that is under way: who was asked when, and who has answered so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ROUND_ENDS = frozenset(
    {"round_finished", "round_skipped", "run_started", "run_finished", "run_stopped"}
)
"""Events after which no round is under way."""
WHERE = ("stage", "phase", "server_round")


@dataclass
class RoundState:
    """One round, from the event that starts it to the one that ends it.

    Attributes:
        since: when it began, seconds since 1970.
        asked: how many sites it asks.
        where: stage, phase and number within the stage.
        replied: clients with a valid reply.
        declined: clients that take no part in it, by their own rules.
        failed: clients without a valid reply.
    """

    since: float
    asked: int
    where: list[Any]
    replied: list[str] = field(default_factory=list)
    declined: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def hear(self, event: Mapping[str, Any]) -> None:
        """Count a reply to this round; events of others are passed over."""
        kinds = {
            "client_finished": self.replied,
            "client_idle": self.declined,
            "client_failed": self.failed,
        }
        if event["event"] not in kinds or [event.get(key) for key in WHERE] != self.where:
            return
        for clients in kinds.values():  # the last word of a client counts
            if event["client"] in clients:
                clients.remove(event["client"])
        kinds[event["event"]].append(event["client"])


def round_after(event: Mapping[str, Any], current: RoundState | None) -> RoundState | None:
    """Return the round that is under way after an event; None: none is."""
    if event["event"] == "round_started":
        where = [event.get(key) for key in WHERE]
        return RoundState(event["time"], int(event.get("clients", 0)), where)
    if event["event"] in ROUND_ENDS:
        return None
    if current is not None:
        current.hear(event)
    return current


def round_line(current: RoundState, number: int, deadline: float, now: float) -> str:
    """Return a round in one line.

    Args:
        current: the round.
        number: of all rounds of the run, from 1.
        deadline: seconds for which it waits for replies; 0: not known.
        now: seconds since 1970.
    """
    sites = "1 site" if current.asked == 1 else f"{current.asked} sites"
    parts = [f"{sites} asked {span(now - current.since)} ago", f"{len(current.replied)} replied"]
    parts += [f"{len(current.declined)} declined"] if current.declined else []
    parts += [f"{len(current.failed)} failed"] if current.failed else []
    left = current.since + deadline - now
    if deadline:
        parts.append(f"deadline in {span(left)}" if left > 0 else "the deadline has passed")
    return f"round {number}: {', '.join(parts)}"


def span(seconds: float) -> str:
    """Return a duration in words: seconds below two minutes, else minutes."""
    whole = max(0, round(seconds))
    return f"{whole} s" if whole < 120 else f"{whole // 60} min"
