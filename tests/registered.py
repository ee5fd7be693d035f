"""Clients of a run in one process, taken for sites: they may be waited for, and asked again."""

from dataclasses import replace

import server.run


def register(monkeypatch, patience=100.0, connected=dict):
    """Let runs believe that their clients are sites; without ``patience`` they do not."""
    find = server.run.find_roster

    def registered(*arguments):
        found = find(*arguments)
        nodes = dict(found.connected())
        return replace(found, connected=lambda: connected(nodes), patience=patience)

    monkeypatch.setattr(server.run, "find_roster", registered)
