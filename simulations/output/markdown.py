"""Rows of a Markdown table; the first column is left aligned, the others right."""

from __future__ import annotations

from collections.abc import Iterator

DASH = "–"
"""In the place of a figure that there is not."""


def head(*names: str) -> Iterator[str]:
    """Yield the two lines that a table begins with."""
    yield row(*names)
    yield "|---|" + "---:|" * (len(names) - 1)


def row(*values: str) -> str:
    """Return one line of a table; a bar within a value is escaped."""
    return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"
