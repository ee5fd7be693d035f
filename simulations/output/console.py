"""A line for people, as it is: no markup, no colours, no breaks of our own."""

from __future__ import annotations

from rich.console import Console


def print_line(console: Console, line: str) -> None:
    """Print it; what is no text in it (half of a character) as code points."""
    line = line.encode("utf-8", "backslashreplace").decode()
    console.print(line, markup=False, highlight=False, soft_wrap=True)
