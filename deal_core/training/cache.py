"""What is computed once and used again, while all it depends on stays the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Cache:
    """In this process only: a restarted one computes it again."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[object, Any]] = {}

    def get_or_compute(self, name: str, basis: object, make: Callable[[], Any]) -> Any:
        """Return what ``make`` gave for this ``basis`` (equal when all it depends on is); what
        it gave for the basis before is forgotten."""
        kept = self._kept.get(name)
        if kept is None or kept[0] != basis:
            kept = self._kept[name] = (basis, make())
        return kept[1]
