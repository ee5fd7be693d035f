"""What the log of a run says of its rounds and clients, in a simulation and in a deployment."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from server.folder import RunEvent, plain_reason, site_name

RoundKey = tuple[int, str, int]
"""Stage, phase, and number of the round within the stage; 0: an evaluation."""


@dataclass(frozen=True)
class Round:
    """A round that has ended, or its part so far (``seconds`` is None)."""

    number: int
    """In the whole run, from 1."""
    stage: int
    """From 0."""
    phase: str
    tasks: list[str]
    asked: int
    """Clients."""
    used: int
    """Replies."""
    loss: float | None
    """Mean over the clients whose replies are used, or that of a secure sum."""
    error: float | None
    """Of the aggregation; None: nothing was aggregated."""
    seconds: float | None
    bytes_up: float | None
    """Mean per client."""
    bytes_down: float | None


class RunLog:
    """The events of a run; a round that was played again after a resume counts once, as it went the
    last time."""

    def __init__(self, events: Iterable[RunEvent]) -> None:
        """Take events in their order."""
        self.events = _last_played(events)

    def of(self, *kinds: str) -> list[RunEvent]:
        """Return the events of some kinds."""
        return [event for event in self.events if event["event"] in kinds]

    @cached_property
    def start(self) -> RunEvent:
        """The last start: tasks, stages, number of clients, names of sites."""
        return self.of("run_started")[-1]

    @property
    def planned(self) -> int:
        """Rounds of the whole run."""
        return sum(int(stage["rounds"]) for stage in self.start["stages"])

    @property
    def stopped(self) -> str:
        """Why it has stopped since it was last started; empty: it has not."""
        last = (self.of("run_started", "run_stopped") or [{"event": ""}])[-1]
        if last["event"] != "run_stopped":
            return ""
        return reason_in(last) or "no reason was logged"

    def name(self, client: object) -> str:
        """Return the site's name of a client's number; the number itself in a simulation."""
        return site_name(str(client), self.start.get("sites") or [])

    @property
    def clients(self) -> list[str]:
        """The numbers of all clients."""
        return [str(number) for number in range(self.start["clients"])]

    @cached_property
    def replies(self) -> dict[RoundKey, dict[str, RunEvent]]:
        """Round to client to the event that says how its reply ended: ``client_finished`` or
        ``client_failed``, the later one where it was asked again."""
        found: dict[RoundKey, dict[str, RunEvent]] = {}
        for event in self.of("client_finished", "client_failed"):
            found.setdefault(round_of(event), {})[str(event["client"])] = event
        return found

    @cached_property
    def excluded(self) -> set[tuple[RoundKey, str]]:
        """Round and client of each reply that a robust step has left out."""
        return {
            (round_of(end), str(client))
            for end in self.of("round_finished")
            for client in end.get("excluded", [])
        }

    @cached_property
    def rounds(self) -> list[Round]:
        """All that have begun, in their order."""
        ends = {round_of(event): event for event in self.of("round_finished")}
        summed = {round_of(event): float(event["loss"]) for event in self.of("loss_summed")}
        found = []
        for begun in self.of("round_started"):
            key = round_of(begun)
            end, replies = ends.get(key, {}), self.replies.get(key, {}).items()
            good = {client: e for client, e in replies if e["event"] == "client_finished"}
            losses = [float(e["loss"]) for e in good.values() if e.get("loss") is not None]
            loss = fmean(losses) if losses else None
            found.append(
                Round(
                    number=begun["round"],
                    stage=begun["stage"],
                    phase=begun["phase"],
                    tasks=list(begun["tasks"]),
                    asked=int(begun["clients"]),
                    used=sum((key, client) not in self.excluded for client in good),
                    loss=summed.get(key, loss),
                    error=end.get("aggregation_error"),
                    seconds=end.get("seconds"),
                    bytes_up=end.get("bytes_up"),
                    bytes_down=end.get("bytes_down"),
                )
            )
        return found

    @property
    def done(self) -> list[Round]:
        """Rounds that have ended."""
        return [each for each in self.rounds if each.seconds is not None]

    @property
    def passed(self) -> int:
        """Rounds that have ended or were skipped."""
        return len(self.done) + len(self.of("round_skipped"))


def _last_played(events: Iterable[RunEvent]) -> list[RunEvent]:
    starts, last, kept = 0, {}, []
    for event in events:
        starts += event["event"] == "run_started"
        if "server_round" in event:
            last[round_of(event)] = starts
        kept.append((starts, event))
    return [e for start, e in kept if "server_round" not in e or start == last[round_of(e)]]


def round_of(event: RunEvent) -> RoundKey:
    """Return the round that an event is of."""
    return (event["stage"], event["phase"], event["server_round"])


def reason_in(event: RunEvent) -> str:
    """Return the reason that an event gives on one line, without the name of the error."""
    first = plain_reason(event.get("reason", event.get("code", "")))
    return "interrupted" if first.startswith("KeyboardInterrupt") else first
