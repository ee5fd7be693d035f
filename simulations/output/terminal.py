"""Markdown pages on a terminal, within a width that fits a window beside another one."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markdown import Markdown
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from simulations.output.markdown import TextTable, blocks

PAGE_WIDTH = 100
"""Columns that a page takes at most."""
NARROW = 80
"""Columns that what ends a run or a study takes at most: those of a window as it opens."""


def print_page(console: Console, page: str, width: int = PAGE_WIDTH) -> None:
    """Print a Markdown page; no line is wider than ``width`` or the console."""
    narrow = min(width, console.width)
    for block in blocks(page.splitlines()):
        if isinstance(block, str):
            console.print(Padding(Markdown(block), (0, 0, 1, 0)), width=narrow)
        else:
            console.print(Padding(text_table(block), (0, 0, 1, 0)), width=narrow)


def text_table(table: TextTable, title: str = "") -> Table:
    """Return a table for a terminal; a cell that does not fit goes on in the next line, and nothing
    of it is cut off."""
    made = Table(
        title=Text(title) if title else None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    for name, right in zip(table.columns, table.right, strict=True):
        made.add_column(Text(name), justify="right" if right else "left", overflow="fold")
    for row in table.rows:
        made.add_row(*(Text(cell) for cell in row))
    return made
