"""Clients of a run in one process, taken for sites: they may be waited for, and asked again."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import server.run
from server.clients import Roster

Connected = Callable[[dict[str, int]], dict[str, int]]
"""From all clients to those who are connected now."""


def register(
    monkeypatch: pytest.MonkeyPatch, patience: float = 100.0, connected: Connected = dict
) -> None:
    """Let runs believe that their clients are sites; without ``patience`` they do not."""
    find = server.run.find_roster

    def registered(*arguments: Any) -> Roster:
        found = find(*arguments)
        nodes = dict(found.connected())
        return replace(found, connected=lambda: connected(nodes), patience=patience)

    monkeypatch.setattr(server.run, "find_roster", registered)
