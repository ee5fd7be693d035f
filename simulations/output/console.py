"""A line for people, as it is: no markup, no colours, no breaks of our own."""

from __future__ import annotations

from rich.console import Console


def print_line(console: Console, line: str) -> None:
    """Print it."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)
