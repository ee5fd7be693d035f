"""A command of the server's administrator, as it can be pasted from any folder."""

from __future__ import annotations

import shlex

from simulations.deployment.server.folder import ServerFolder


def command(folder: ServerFolder, words: str) -> str:
    """Return ``deal WORDS`` for the server in ``folder``: with ``--dir``, without which every
    command looks for the server in the folder that it is called from."""
    return f"deal {words} --dir {shlex.quote(str(folder.path))}"
