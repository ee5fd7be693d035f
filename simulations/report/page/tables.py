"""Tables of Markdown pages as tables of HTML pages: the same words and figures in both."""

from __future__ import annotations

from collections.abc import Iterable

from simulations.output.files import TextTable, blocks
from simulations.report.page.blocks import Block, Table, Text


def from_markdown(
    lines: Iterable[str], caption: str, words: tuple[int, ...] = ()
) -> tuple[Block, ...]:
    """Return the blocks of a part of a Markdown page: its tables, each with the caption, and the
    paragraphs between them.

    Args:
        lines: of the page.
        caption: of every table.
        words: places of columns of words, though the page aligns them as figures.
    """
    made: list[Block] = []
    for block in blocks(list(lines)):
        if isinstance(block, TextTable):
            made.append(table(block, caption, words))
        else:
            made += [Text(plain(part)) for part in block.split("\n\n")]
    return tuple(made)


def table(text: TextTable, caption: str, words: tuple[int, ...] = ()) -> Table:
    """Return the table for a page; ``words`` as in :func:`from_markdown`."""
    left = tuple(i for i, right in enumerate(text.right) if i and not right)
    return Table(caption, text.columns, text.rows, (*left, *words))


def plain(text: str) -> str:
    """Return a paragraph of our own Markdown without its marks."""
    return " ".join(text.replace("`", "").split())
