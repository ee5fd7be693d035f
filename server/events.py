"""What happened, one JSON object a line, for people, progress views and scripts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RunEvent = dict[str, Any]
Listener = Callable[[RunEvent], None]


ROUND_OVER = ("round_finished", "round_skipped")
PLAYED = ("client_finished", "loss_summed", *ROUND_OVER)
"""Events that a round has again when it is played again."""
TOLD_TO_END = "its process was told to end"
"""Why a run stopped that was ended from outside, in the place of the name of an exception."""


@dataclass(frozen=True)
class EventLog:
    """Appends events to ``path`` and hands each to ``listener``."""

    path: Path
    listener: Listener | None = None

    def mend(self) -> None:
        """Drop a last line that a crash has cut off: what follows it could not be read."""
        if not self.path.exists():
            return
        with self.path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)

    def write(self, event: str, **fields: Any) -> None:
        """Append one event; the line is complete before the listener sees it."""
        record = {"event": event, "time": time.time(), **fields}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.listener is not None:
            self.listener(record)


def read_events(path: Path) -> list[RunEvent]:
    """Return the complete lines of ``metrics.jsonl``; none where there is no file yet."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def site_name(client: str, sites: Sequence[str]) -> str:
    """Return the name of the site that is a client; in a simulation, where there are none, the
    client's number."""
    return sites[int(client)] if client.isdigit() and int(client) < len(sites) else client


def plain_reason(reason: object) -> str:
    """Return why a run stopped on one line, without the name of the error."""
    if str(reason).startswith("SystemExit"):
        return TOLD_TO_END
    return str(reason).partition("\n")[0].removeprefix("UserError: ").strip()


def without_undone(events: Iterable[RunEvent]) -> list[RunEvent]:
    """Return the events without rounds that a crash undid after they had ended: a resumed run
    plays them again."""
    kept: list[RunEvent] = []
    for event in events:
        if event["event"] == "run_started":
            kept = _first_rounds(kept, int(event["done_rounds"]))
        kept.append(event)
    return kept


def _first_rounds(events: Iterable[RunEvent], rounds: int) -> list[RunEvent]:
    kept, over = [], 0
    for event in events:
        if over < rounds or event["event"] not in PLAYED:
            kept.append(event)
        over += event["event"] in ROUND_OVER
    return kept
