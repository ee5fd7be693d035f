"""What happened, one JSON object a line, for people, progress views and scripts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RunEvent = dict[str, Any]
Listener = Callable[[RunEvent], None]


@dataclass(frozen=True)
class EventLog:
    """Appends events to ``path`` and hands each to ``listener``."""

    path: Path
    listener: Listener | None = None

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
