"""The end of a study on a terminal: one table that fits a window of 80 columns."""

from __future__ import annotations

from rich.console import Console

from simulations.output.console import NARROW, text_table
from simulations.output.files import TextTable, blocks
from simulations.study.results import StudyResults
from simulations.study.study_file import Study
from simulations.study.tables import ALL_LABELS, AVERAGE_ACCURACY, arms_table, best_settings

SHOWN = ("arm", "n", AVERAGE_ACCURACY, ALL_LABELS, "backward transfer", "forgetting")
"""Columns; ``study.md`` has the others."""
TITLE = "Means with 95 % intervals; accuracies in %, transfer and forgetting in points"


def print_summary(console: Console, study: Study, results: StudyResults) -> None:
    """Print the measures of every arm; under several settings, the best setting of each arm.
    Nothing where no cell is done."""
    if not results.cells:
        return
    if len(study.file.settings) > 1:
        table = first_table(list(best_settings(study, results.cells)))
    else:
        table = narrowed(first_table(list(arms_table(study, results.cells))))
    console.print(text_table(table, TITLE), width=min(NARROW, console.width))


def first_table(lines: list[str]) -> TextTable:
    """Return the first table of a page.

    Raises:
        StopIteration: there is none.
    """
    return next(block for block in blocks(lines) if isinstance(block, TextTable))


def narrowed(table: TextTable) -> TextTable:
    """Return the columns that are shown at the end of a study."""
    places = [i for i, name in enumerate(table.columns) if name in SHOWN]
    rows = tuple(tuple(row[i] for i in places) for row in table.rows)
    columns = tuple(table.columns[i] for i in places)
    return TextTable(columns, tuple(table.right[i] for i in places), rows)
