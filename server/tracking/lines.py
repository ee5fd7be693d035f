"""What a tracker's process reads from its standard input: one JSON object a line.

The first holds ``settings``; then each ``step`` (rounds over the whole run) has ``figures``; a run
that has finished says so. The input ends with the run, however it ended.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any


def settings() -> dict[str, Any]:
    """Return the settings of the run by flat key: the first line."""
    return dict(json.loads(sys.stdin.readline())["settings"])


def lines() -> Iterator[Mapping[str, Any]]:
    """Yield all further lines as they come."""
    for line in sys.stdin:
        yield json.loads(line)


def figures(line: Mapping[str, Any]) -> tuple[int, Mapping[str, float]]:
    """Return step and figures of a line; none in one that says that the run has finished."""
    return line.get("step", 0), line.get("figures", {})
