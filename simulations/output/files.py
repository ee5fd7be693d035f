"""Text of figures and TOML, and files that commands leave and read again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
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


def size(count: float | None) -> str:
    """Return bytes in the unit that suits them."""
    if count is None:
        return DASH
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"


NUMBER = re.compile(rf"[-+−±×≥<≤ ]*\d.*|{DASH}|none|no bound")
"""What a column of figures has in its cells."""


@dataclass(frozen=True)
class Table:
    """A table of a terminal or of a page; the first cell of a row names it."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    shaded: bool = False
    """Cells are shares in per cent, and coloured by them on a page."""
    best: frozenset[tuple[int, int]] = frozenset()
    """Row and column of the cells that are shown in bold."""

    def is_number(self, place: int) -> bool:
        """Whether a column holds figures, which are aligned to the right."""
        return place > 0 and all(NUMBER.fullmatch(row[place]) for row in self.rows if row[place])

    def level(self, cell: str) -> str:
        """Return the class of a shaded cell's colour, ``h0`` to ``h9``; empty: it has none."""
        return f"h{min(9, int(float(cell) / 10))}" if self.shaded and cell != DASH else ""


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
