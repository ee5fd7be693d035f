"""Tables in Markdown, written and read; the first column is left aligned, the others right."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

DASH = "–"
"""In the place of a figure that there is not."""

BETWEEN_CELLS = re.compile(r"(?<!\\)\|")


@dataclass(frozen=True)
class TextTable:
    """A table as read.

    Attributes:
        columns: their names.
        right: which of them are aligned to the right: figures.
        rows: as many cells each.
    """

    columns: tuple[str, ...]
    right: tuple[bool, ...]
    rows: tuple[tuple[str, ...], ...]


def head(*names: str) -> Iterator[str]:
    """Yield the two lines that a table begins with."""
    yield row(*names)
    yield "|---|" + "---:|" * (len(names) - 1)


def row(*values: str) -> str:
    """Return one line of a table; a bar within a value is escaped."""
    return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"


def cells(line: str) -> tuple[str, ...]:
    """Return the values of one line of a table, as :func:`row` was given them."""
    values = BETWEEN_CELLS.split(line.strip())[1:-1]
    return tuple(value.strip().replace("\\|", "|") for value in values)


def read_table(lines: Sequence[str]) -> TextTable:
    """Return a table from its lines: names, a line of dashes, rows."""
    columns, dashes, *rows = lines
    right = tuple(each.endswith(":") for each in cells(dashes))
    return TextTable(cells(columns), right, tuple(cells(each) for each in rows))


def blocks(lines: Sequence[str]) -> Iterator[str | TextTable]:
    """Yield a page in pieces: every table by itself, and what is between tables as it is."""
    for in_table, part in groupby(
        lines, lambda line: line.startswith("| ") or line.startswith("|--")
    ):
        if in_table:
            yield read_table(list(part))
        elif text := "\n".join(part).strip():
            yield text
