"""A line of ``deal site check`` that is neither right nor wrong: what does not take place here."""

from __future__ import annotations


class Note(str):
    """It is printed with ``note``, where a line that is as it should be is printed with ``ok``."""

    __slots__ = ()


def label_of(line: str) -> str:
    """Return the word before a line."""
    return "note" if isinstance(line, Note) else "ok"
