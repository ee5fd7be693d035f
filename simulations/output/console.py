"""What people see in a terminal: the console, its width, titles of stages, tables."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args, get_type_hints

import click
import rich.table
from rich import box
from rich.console import Console, JustifyMethod
from rich.text import Text
from typer.models import ArgumentInfo

from deal_core.errors import UserError
from deal_core.metrics import in_turn
from simulations.output.files import Table


def print_line(console: Console, line: str) -> None:
    """Print it; what is no text in it (half of a character) as code points."""
    line = line.encode("utf-8", "backslashreplace").decode()
    console.print(line, markup=False, highlight=False, soft_wrap=True)


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
