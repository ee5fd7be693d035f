"""Runs side by side: what ``deal compare`` prints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from deal_core.config.run_config import leaves
from deal_core.errors import UserError, at_home
from server.results import Results, read_results
from simulations.output.console import NARROW, print_line, text_table
from simulations.output.files import DASH, TextTable
from simulations.report.blocks import at_most, percent, points, time
from simulations.report.run import HIDDEN, shown
from simulations.run.run_folder import rows_of

COLUMNS = ("run", "Task-IL", "Class-IL", "backward", "forgot", "worst", "epsilon", "time")


def compare(folders: Sequence[str], console: Console) -> None:
    """Print measures of the runs in the folders in at most 80 columns, what their epsilons mean,
    why figures may not be comparable, and the settings that differ.

    Raises:
        UserError: fewer than two runs, one twice, or one that has not finished.
    """
    paths = [at_home(folder).resolve() for folder in folders]
    if len(paths) < 2:
        raise UserError("deal compare: name two runs at least")
    if len(set(paths)) < len(paths):
        raise UserError("deal compare: names a run twice; name each once")
    runs = dict(zip(_names(paths), map(read_results, paths), strict=True))
    for warning in (*_warnings(list(runs.values())), *_other_rows(paths)):
        print_line(console, f"warning: {warning}")
    told = {name: found.privacy.meaning for name, found in runs.items() if _epsilon(found)}
    meanings = list(dict.fromkeys(told.values()))
    rows = []
    for name, found in runs.items():
        mark = f" [{meanings.index(told[name]) + 1}]" if name in told else ""
        rows.append((name, *_measures(found, mark)))
    right = (False, *[True] * (len(COLUMNS) - 1))
    title = "Accuracies in %, backward transfer and forgetting in points"
    table = TextTable(COLUMNS, right, tuple(rows))
    console.print(text_table(table, title), width=min(NARROW, console.width))
    for number, meaning in enumerate(meanings, start=1):
        print_line(console, f"[{number}] epsilon {meaning}")
    settings = [leaves(found.config) for found in runs.values()]
    differing = [
        (key, *(shown(own[key]) for own in settings))
        for key in settings[0]
        if key not in HIDDEN and len({json.dumps(own[key]) for own in settings}) > 1
    ]
    if differing:
        table = TextTable(("key", *runs), (False,) * (len(runs) + 1), tuple(differing))
        console.print(text_table(table, "Settings that differ"), width=min(NARROW, console.width))
    print_line(console, "One run each: differences of a point or two may be chance (deal study).")


def _measures(found: Results, mark: str) -> tuple[str, ...]:
    among_all, worst, epsilon = found.class_incremental, found.worst_client, _epsilon(found)
    return (
        percent(found.average_accuracy),
        percent(among_all.average_accuracy if among_all else None),
        points(found.backward_transfer),
        percent(found.forgetting),
        percent(worst[1] if worst else None),
        DASH if epsilon is None else at_most(epsilon) + mark,
        time(found.seconds.get("total")),
    )


def _epsilon(found: Results) -> float | None:
    """Return the largest over clients; None: there is no guarantee."""
    privacy = found.privacy
    if privacy.delta is None or privacy.unit is None:
        return None
    return max(privacy.epsilon.values(), default=None)


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the names of the folders, with as many of their parents as make them different."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _warnings(results: Sequence[Results]) -> Iterator[str]:
    if len({tuple(sorted(each.tasks)) for each in results}) > 1:
        yield "The runs have different tasks: their accuracies are of different questions."
    elif len({tuple(each.tasks) for each in results}) > 1:
        yield "The runs have the same tasks in different orders."
    if len({each.config.model.name for each in results}) > 1:
        yield "The runs have different base models."


def _other_rows(paths: Sequence[Path]) -> Iterator[str]:
    """Yield a line on tasks whose rows differ, by what the runs have noted of them."""
    rows = [rows_of([path]) for path in paths]
    for task in rows[0]:
        if len({each[task] for each in rows if task in each}) > 1:
            yield f"Task '{task}' has other rows in one run than in another."
