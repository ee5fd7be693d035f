"""What people see in a terminal: the console, its width, titles of stages, tables."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args, get_type_hints

import click
from rich import box
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table
from rich.text import Text
from typer.models import ArgumentInfo

from deal_core.errors import UserError
from deal_core.metrics import in_turn
from simulations.output.files import TextTable


def print_line(console: Console, line: str) -> None:
    """Print it; what is no text in it (half of a character) as code points."""
    line = line.encode("utf-8", "backslashreplace").decode()
    console.print(line, markup=False, highlight=False, soft_wrap=True)


WIDTH = 160
"""Columns where nobody knows the width: tables must not wrap in a log file."""


def wide_console() -> Console:
    """Return the terminal, or a wide one where there is none."""
    return Console(width=None if sys.stdout.isatty() else WIDTH)


PAGE_WIDTH = 100
"""Columns that a page takes at most."""
NARROW = 80
"""Columns that what ends a run or a study takes at most: those of a window as it opens."""


def print_page(console: Console, page: str) -> None:
    """Print a Markdown page; no line is wider than :data:`PAGE_WIDTH` or the console."""
    console.print(Markdown(page), width=min(PAGE_WIDTH, console.width))


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
    """Check that a folder has no figures of another kind than ``own`` (a file of :data:`FIGURES`):
    their report would be replaced.

    Raises:
        UserError: it has.
    """
    for file, kind in FIGURES.items():
        if file != own and (out / file).exists():
            raise UserError(f"{out}: holds {kind}; name another --out")


def with_argument_help(command: click.Command) -> click.Command:
    """Return the command; its arguments, and those of all commands below it, have the texts of
    their ``Annotated[..., typer.Argument(help=...)]``."""
    for below in getattr(command, "commands", {}).values():
        with_argument_help(below)
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    if arguments and command.callback is not None:
        hints = get_type_hints(inspect.unwrap(command.callback), include_extras=True)
        for argument in arguments:
            told = [e for e in get_args(hints[str(argument.name)]) if isinstance(e, ArgumentInfo)]
            argument.help = told[0].help if told else None
    return command
