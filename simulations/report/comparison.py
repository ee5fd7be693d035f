"""Runs side by side: what ``deal compare`` prints."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from deal_core.config.file import leaves
from deal_core.errors import UserError, at_home
from server.results import Results, read_results
from simulations.output import DASH, Table, print_line, print_table
from simulations.report.blocks import at_most, percent, points, time
from simulations.report.run import HIDDEN, shown
from simulations.run.simulate import rows_of

COLUMNS = ("run", "Task-IL", "Class-IL", "backward", "forgot", "worst", "epsilon", "time")


def compare(folders: Sequence[str], console: Console) -> None:
    """Print measures of the runs in the folders in at most 80 columns, what their epsilons mean,
    why figures may not be comparable, and the settings that differ.

    Raises:
        UserError: fewer than two runs, one twice, or one that has not finished.
    """
    paths = [at_home(folder).resolve() for folder in folders]
    if len(set(paths)) < max(2, len(paths)):
        raise UserError("deal compare: name two runs at least, and each once")
    above = os.path.commonpath(paths)
    runs = {str(path.relative_to(above)): read_results(path) for path in paths}
    _warn(runs, paths, console)
    epsilons = {name: _epsilon(found) for name, found in runs.items()}
    meanings = [each.privacy.meaning for name, each in runs.items() if epsilons[name] is not None]
    meanings = list(dict.fromkeys(meanings))
    rows = []
    for name, found in runs.items():
        among_all, worst, epsilon = found.class_incremental, found.worst_client, epsilons[name]
        spent = DASH
        if epsilon is not None:
            spent = f"{at_most(epsilon)} [{meanings.index(found.privacy.meaning) + 1}]"
        figures = (
            percent(found.average_accuracy),
            percent(among_all.average_accuracy if among_all else None),
            points(found.backward_transfer),
            percent(found.forgetting),
            percent(worst[1] if worst else None),
            spent,
            time(found.seconds.get("total")),
        )
        rows.append((name, *figures))
    title = "Accuracies in %, backward transfer and forgetting in points"
    print_table(console, Table(title, COLUMNS, tuple(rows)))
    for number, meaning in enumerate(meanings, start=1):
        print_line(console, f"[{number}] epsilon {meaning}")
    settings = [leaves(found.config) for found in runs.values()]
    differing = [
        (key, *(shown(own[key]) for own in settings))
        for key in settings[0]
        if key not in HIDDEN and len({json.dumps(own[key]) for own in settings}) > 1
    ]
    if differing:
        print_table(console, Table("Settings that differ", ("key", *runs), tuple(differing)))
    print_line(console, "One run each: differences of a point or two may be chance (deal study).")


def _epsilon(found: Results) -> float | None:
    """Return the largest over clients; None: there is no guarantee."""
    privacy = found.privacy
    if privacy.delta is None or privacy.unit is None:
        return None
    return max(privacy.epsilon.values(), default=None)


def _warn(runs: Mapping[str, Results], paths: Sequence[Path], console: Console) -> None:
    """Print why figures may not be comparable."""
    orders, warnings = {tuple(found.tasks) for found in runs.values()}, []
    if len(set(map(frozenset, orders))) > 1:
        warnings.append("The runs have different tasks: their accuracies are of other questions.")
    elif len(orders) > 1:
        warnings.append("The runs have the same tasks in different orders.")
    if len({found.config.model.name for found in runs.values()}) > 1:
        warnings.append("The runs have different base models.")
    rows = [rows_of([path]) for path in paths]
    for task in rows[0]:
        if len({each[task] for each in rows if task in each}) > 1:
            warnings.append(
                f"Task '{task}' has other rows in one run than in another, by other files or "
                "settings of data: part of a difference in its accuracy may be theirs."
            )
    for warning in warnings:
        print_line(console, f"warning: {warning}")
