"""What people read of the command: lines and tables of a terminal, text of figures, TOML, files
that commands leave and read again, and those that are shipped. Nothing that computes."""

from __future__ import annotations

import json
import re
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import rich.table
from rich import box
from rich.console import Console, JustifyMethod
from rich.text import Text

from deal_core.atomic_write import atomic_write
from deal_core.errors import UserError, at_home
from deal_core.metrics import in_turn

if TYPE_CHECKING:  # the command starts light
    from pydantic import BaseModel


def write_texts(out: Path, texts: Mapping[str, str]) -> None:
    """Write files into a folder, made where it is missing. UserError: it cannot be written."""
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


def percent(share: float | None) -> str:
    """Return a share of 0 to 1 in per cent, without the sign; a dash where there is none."""
    return DASH if share is None else f"{100 * share:.1f}"


def signed(difference: float | None) -> str:
    """Return a difference of shares in points with their sign: ``+1.5``; a dash where there is
    none."""
    if difference is None:
        return DASH
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


def print_line(console: Console, line: str) -> None:
    """Print it; what is no text in it (half of a character) as code points."""
    line = line.encode("utf-8", "backslashreplace").decode()
    console.print(line, markup=False, highlight=False, soft_wrap=True)


LONGEST_SILENCE = 5.0
"""Seconds after which a long stretch of work says how far it is."""


@contextmanager
def at_work(console: Console, first: str) -> Iterator[Callable[..., None]]:
    """Say what takes its time within the block: beside a spinner where the console is a terminal,
    else in lines on standard error.

    Yields:
        ``say(what, how_far="")``, which tells what goes on now. A new ``what`` is a line at once,
        how far it is only where the last line is ``LONGEST_SILENCE`` old.
    """
    spinner = console.status(Text(first)) if console.is_interactive else None
    last, since = "", 0.0

    def say(what: str, how_far: str = "") -> None:
        nonlocal last, since
        line = f"{what}, {how_far}" if how_far else what
        if spinner is not None:
            spinner.update(Text(line))
        elif what != last or (how_far and time.monotonic() - since >= LONGEST_SILENCE):
            print_line(Console(stderr=True), line)
            last, since = what, time.monotonic()

    with spinner or nullcontext():
        say(first)
        yield say


WIDTH = 160
"""Columns where nobody knows the width: tables must not wrap in a log file."""


def wide_console() -> Console:
    """Return the terminal, or a wide one where there is none."""
    return Console(width=None if sys.stdout.isatty() else WIDTH)


NARROW = 80
"""Columns that what ends a run or a study takes at most: those of a window as it opens."""


def print_table(console: Console, table: Table) -> None:
    """Print a table; a cell that does not fit goes on in the next line, and nothing of it is cut
    off."""
    made = rich.table.Table(
        title=Text(table.caption),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    for place, name in enumerate(table.columns):
        justify: JustifyMethod = "right" if table.is_number(place) else "left"
        made.add_column(Text(name), justify=justify, overflow="fold")
    for y, row in enumerate(table.rows):
        bold = ["bold" if (y, x) in table.best else "" for x in range(len(row))]
        made.add_row(*map(Text, row, bold))
    console.print(made, width=min(NARROW, console.width))


def stage_title(stage: int, tasks: Sequence[str], stages: Sequence[Sequence[str]]) -> str:
    """Return ``2 skin``, the stage's task (stages count from 0), where tasks come in turn; else
    ``stage 2: 1 heart, 3 eye``, or ``all tasks at once``."""
    if [list(work) for work in stages] == [list(tasks)] and len(tasks) > 1:
        return "all tasks at once"
    worked = ", ".join(f"{tasks.index(task) + 1} {task}" for task in stages[stage])
    return worked if in_turn(tasks, stages) else f"stage {stage + 1}: {worked}"


FIGURES = {
    "results.json": "a run",
    "study.json": "a study",
    "audit.json": "an audit",
    "membership.json": "an audit of membership",
}
"""Where they are to what they are of."""


def require_one_kind(out: Path, own: str) -> None:
    """Raise UserError where a folder has figures of another kind than those in a file ``own``."""
    for file, kind in FIGURES.items():
        if file != own and (out / file).exists():
            raise UserError(f"{out}: holds {kind}; name another --out")


def shipped_experiments() -> dict[str, Path]:
    """Return name to file, sorted by name."""
    return _files("experiments")


def shipped_studies() -> dict[str, Path]:
    """Return name to file, sorted by name."""
    return _files("studies")


def _files(folder: str) -> dict[str, Path]:
    paths = (Path(__file__).parent / folder).glob("*.toml")
    return {path.stem: path for path in sorted(paths, key=lambda path: path.stem)}


def descriptions(files: Mapping[str, Path]) -> dict[str, str]:
    """Return name to its one-line purpose."""
    return {
        name: str(tomllib.loads(path.read_text(encoding="utf-8")).get("description", ""))
        for name, path in files.items()
    }
