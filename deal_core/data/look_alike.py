"""Labels that a reader takes for the same, and a program for two."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

INVISIBLE = "Cf"
"""Unicode's category of characters that are not shown."""


def folded(label: str) -> str:
    """Return what labels that look alike have in common: without case, blanks, ``_``, invisible
    characters, forms of one letter, and ``.0`` behind a whole number."""
    plain = unicodedata.normalize("NFKC", label)
    shown = "".join(c for c in plain if unicodedata.category(c) != INVISIBLE)
    words = unicodedata.normalize("NFKC", shown.casefold()).replace("_", " ").split()
    text = " ".join(words)
    whole = text.removesuffix(".0")
    return whole if whole.removeprefix("-").isdecimal() else text


def look_alike(label: str, labels: Iterable[str]) -> str:
    """Return a hint at the first of some labels that looks like this one; empty: none does."""
    form = folded(label)
    for other in labels:
        if other != label and folded(other) == form:
            return f" ({other!a} looks alike; this one is {label!a})"
    return ""
