"""The console of a command; rich loads when one is made."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 160
"""Columns where nobody knows the width: tables must not wrap in a log file."""


def wide_console() -> Console:
    """Return the terminal, or a wide one where there is none."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH)
