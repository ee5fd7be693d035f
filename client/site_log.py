"""The site's own log: one JSON object a line, in its state folder. It is never sent."""

from __future__ import annotations

import json
import logging
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOG = "log.jsonl"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SiteLog:
    """Appends events to ``folder``, which is made when first needed."""

    folder: Path

    def write(self, event: str, **fields: Any) -> None:
        """Append one event. A log that cannot be written stops nothing: the line then goes to
        the output of the process."""
        line = json.dumps({"event": event, "time": time.time(), **fields})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / LOG).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError:
            log.exception("the site's log cannot be written: %s", line)

    def refusal(self, event: str, error: BaseException, **fields: Any) -> None:
        """Append what the site has declined by its own rules: the reason, and no traceback, since
        nothing went wrong."""
        self.write(event, reason=str(error), **fields)

    def fault(self, event: str, error: BaseException, **fields: Any) -> None:
        """Append what went wrong, with all that is known of it."""
        told = "".join(traceback.format_exception(error))
        self.write(event, error=f"{type(error).__name__}: {error}", traceback=told, **fields)
