"""A comparison on a terminal: a table of at most 80 columns."""

from __future__ import annotations

from rich.console import Console

from server.results import rounded_up
from simulations.output.console import NARROW, print_line, text_table
from simulations.output.files import DASH, TextTable
from simulations.report.comparison.compared import ComparedRun, Comparison
from simulations.report.run.settings import shown
from simulations.run.live_view import duration, signed

COLUMNS = ("run", "average", "all labels", "backward", "forgot", "worst", "epsilon", "time")
LONGEST_VALUE = 24
"""Letters of a setting's value."""
TITLE = "Accuracies in %, backward transfer and forgetting in points"


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Print the measures of all runs, what their epsilons mean, and in what settings they
    differ."""
    for warning in comparison.warnings:
        print_line(console, f"warning: {warning}")
    meanings = list(dict.fromkeys(run.guarantee for run in comparison.runs if run.guarantee))
    rows = tuple(_row(run, meanings) for run in comparison.runs)
    right = (False, *[True] * (len(COLUMNS) - 1))
    width = min(NARROW, console.width)
    console.print(text_table(TextTable(COLUMNS, right, rows), TITLE), width=width)
    for number, meaning in enumerate(meanings, start=1):
        print_line(console, f"[{number}] {meaning}")
    if comparison.keys:
        console.print()
        names = tuple(run.name for run in comparison.runs)
        if len(names) <= 4:
            cells = tuple(
                (key, *(_short(shown(run.settings[key])) for run in comparison.runs))
                for key in comparison.keys
            )
            left = (False,) * (len(names) + 1)
            table = TextTable(("setting", *names), left, cells)
            console.print(text_table(table, "Settings that differ"), width=width)
        else:
            print_line(console, f"settings that differ: {', '.join(comparison.keys)}")


def _short(value: str) -> str:
    """Return a value that fits a column; the page has all of it."""
    return value if len(value) <= LONGEST_VALUE else value[: LONGEST_VALUE - 1] + "…"


def _row(run: ComparedRun, meanings: list[str]) -> tuple[str, ...]:
    found = run.results
    mark = f" [{meanings.index(run.guarantee) + 1}]" if run.guarantee else ""
    return (
        run.name,
        _percent(found.average_accuracy),
        _percent(run.among_all),
        DASH if found.backward_transfer is None else signed(found.backward_transfer),
        _percent(found.forgetting),
        _percent(run.worst_client),
        DASH if run.epsilon is None else f"{rounded_up(run.epsilon, 3)}{mark}",
        DASH if run.seconds is None else duration(run.seconds),
    )


def _percent(share: float | None) -> str:
    return DASH if share is None else f"{100 * share:.1f}"
