"""A server that sends another app than the one that a site has reviewed."""

from __future__ import annotations

from pathlib import Path

from simulations.engines.flower import app_folder

COMMENT = "\n# one comment more\n"
MARKER = """
import os
with open({path!r}, "a") as marker:
    marker.write(os.environ.get("FLWR_HOME", "") + "\\n")
"""
"""Whoever imports the app leaves a line that says who it is: the server does so, too."""


def changed_app(folder: Path, added: str) -> Path:
    """A copy of the app, with lines at the end of a module that the client imports first."""
    for room in ("server", "client", "deal_core"):
        for source in (app_folder() / room).rglob("*.py"):
            target = folder / source.relative_to(app_folder())
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    (folder / "pyproject.toml").write_bytes((app_folder() / "pyproject.toml").read_bytes())
    with (folder / "client" / "__init__.py").open("a") as module:
        module.write(added)
    return folder
