"""Which commit of this project runs, where that can be known."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The checkout, where the package was not installed from a wheel or sent by Flower."""


def commit(root: Path = ROOT) -> str:
    """Return the hash of the commit, with ``-dirty`` where files differ from it.

    Args:
        root: folder of the checkout. A folder that merely lies in another repository, as that of
            an installed package may, is none.

    Returns:
        Empty where there is no checkout, or no git.
    """
    if not (root / ".git").exists():
        return ""
    asked = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(
            [*asked, "--exclude=*"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
