"""Text of figures, Markdown and TOML, and files that commands leave and read again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from deal_core.atomic_write import atomic_write
from deal_core.errors import UserError, at_home

if TYPE_CHECKING:  # the command starts light
    from pydantic import BaseModel


def write_texts(out: Path, texts: Mapping[str, str]) -> None:
    """Write files into a folder, made where it is missing.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        for name, text in texts.items():
            atomic_write(out / name, text)
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({error.strerror}); choose another --out"
        ) from None


def write_file(name: str | Path, text: str) -> Path:
    """Write one file, its folder made where it is missing, and return its path."""
    path = at_home(name)
    if path.is_dir():
        raise UserError(f"{name}: is a folder; name a file")
    write_texts(path.parent, {path.name: text})
    return path


Stored = TypeVar("Stored", bound="BaseModel")


def read_stored(
    model: type[Stored], path: Path, what: str, cure: str = "name a folder that has one"
) -> Stored:
    """Return the content of a JSON file, checked against a model.

    Raises:
        UserError: it cannot be read, or is no ``what``; ``cure`` says what to do.
    """
    try:
        return model.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no {what} ({str(error).splitlines()[0]}); {cure}") from None


DASH = "–"
"""In the place of a figure that there is not."""


def signed(difference: float) -> str:
    """Return points with their sign: ``+1.5``."""
    return f"{round(100 * difference, 1) + 0.0:+.1f}"  # + 0.0: no minus before a zero


def duration(seconds: float) -> str:
    """Return a rounded time: ``40 s``, ``2 min 10 s``, ``3 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


BETWEEN_CELLS = re.compile(r"(?<!\\)\|")


@dataclass(frozen=True)
class TextTable:
    """A table as read: as many cells a row as there are columns."""

    columns: tuple[str, ...]
    right: tuple[bool, ...]
    """Which of them are aligned to the right: figures."""
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


def toml_value(value: Any) -> str:
    """Return a bool, number, string, list or dict on one line of TOML."""
    if hasattr(value, "item") and not isinstance(value, Mapping):  # a number of numpy or torch
        value = value.item()
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        # A JSON string is a TOML string, but for DEL, and for pairs of \u escapes.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        pairs = (f"{toml_value(str(key))} = {toml_value(item)}" for key, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    return "[" + ", ".join(toml_value(item) for item in value) + "]"


def toml_lines(values: Mapping[str, Any]) -> str:
    """Return one ``key = value`` line per entry; the keys are dotted bare keys."""
    return "".join(f"{key} = {toml_value(value)}\n" for key, value in values.items())
