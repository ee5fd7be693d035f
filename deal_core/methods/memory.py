"""What a client computes once for a task and uses in all its rounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class TaskMemory:
    """One client's, for one task; in memory only, so a restarted process computes it again."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[str, Any]] = {}

    def once(self, name: str, basis: str, make: Callable[[], Any]) -> Any:
        """Return what ``make`` gave for this ``basis`` (a digest of all it depends on)."""
        kept = self._kept.get(name)
        if kept is None or kept[0] != basis:
            kept = self._kept[name] = (basis, make())
        return kept[1]
