"""A server that sends another app than the one that is installed at a site."""

from __future__ import annotations

import shutil
from pathlib import Path

from simulations.engines.flower import BUNDLE

COMMENT = "\n# one comment more\n"
MARKER = """
import os
with open({path!r}, "a") as marker:
    marker.write(os.environ.get("FLWR_HOME", "") + "\\n")
"""
"""Whoever imports the app leaves a line that says who it is: the server does so, too."""


def changed_app(folder: Path, added: str) -> Path:
    """A copy of the app, with lines at the end of its module."""
    shutil.copytree(BUNDLE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "deal_app.py").open("a") as module:
        module.write(added)
    return folder
