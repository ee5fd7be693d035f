"""Labels and names that a reader takes for the same, and a program for two."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

INVISIBLE = "Cf"
"""Unicode's category of characters that are not shown."""


def folded(label: str) -> str:
    """Return what labels that look alike have in common: without case, blanks, ``_``, invisible
    characters, forms of one letter, and ``.0`` behind a whole number."""
    text = " ".join(_plain(label).replace("_", " ").split())
    whole = text.removesuffix(".0")
    return whole if whole.removeprefix("-").isdecimal() else text


def same_person(value: str) -> str:
    """Return what the spellings of one person's name or number have in common: without case,
    further blanks, invisible characters, forms of one letter, and zeros before a whole number."""
    text = " ".join(_plain(value).split())
    return text.lstrip("0") or "0" if text.isdecimal() else text


def alike_people(values: Iterable[str]) -> list[list[str]]:
    """Return values, as :func:`same_person` has them, that differ in other characters than letters
    and digits alone."""
    alike: dict[str, set[str]] = {}
    for value in values:
        alike.setdefault("".join(filter(str.isalnum, value)) or value, set()).add(value)
    return [sorted(some) for some in alike.values() if len(some) > 1]


def _plain(text: str) -> str:
    """The text without case, invisible characters, and forms of one letter."""
    plain = unicodedata.normalize("NFKC", text)
    shown = "".join(c for c in plain if unicodedata.category(c) != INVISIBLE)
    return unicodedata.normalize("NFKC", shown.casefold())


def look_alike(label: str, labels: Iterable[str]) -> str:
    """Return a hint at the first of some labels that looks like this one; empty: none does."""
    form = folded(label)
    for other in labels:
        if other != label and folded(other) == form:
            return f" ({other!a} looks alike; this one is {label!a})"
    return ""
