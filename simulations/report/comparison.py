"""Runs side by side: what ``deal compare`` prints, and its page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from deal_core import metrics
from deal_core.config.run_config import leaves
from deal_core.errors import UserError, at_home
from server.results import Results, read_results
from simulations.output.console import NARROW, print_line, text_table
from simulations.output.files import TextTable
from simulations.report.blocks import (
    Block,
    Facts,
    Notice,
    Page,
    Section,
    Table,
    Text,
    at_most,
    percent,
    points,
    size,
    time,
)
from simulations.report.charts import Curve, lines
from simulations.report.run import HIDDEN, shown
from simulations.run.run_folder import rows_of


@dataclass(frozen=True)
class ComparedRun:
    """One run.

    Attributes:
        name: of its folder, made its own among those compared.
        settings: those in which the runs differ, by flat key.
    """

    name: str
    results: Results
    settings: Mapping[str, Any]

    @property
    def epsilon(self) -> float | None:
        """Largest over clients; None: there is no guarantee."""
        privacy = self.results.privacy
        if privacy.delta is None or privacy.unit is None:
            return None
        return max(privacy.epsilon.values(), default=None)

    @property
    def meaning(self) -> str:
        """What the epsilon means; empty where there is none."""
        return "" if self.epsilon is None else f"epsilon {self.results.privacy.meaning}"


@dataclass(frozen=True)
class Comparison:
    """Runs side by side; ``warnings``: why figures may not be comparable."""

    runs: tuple[ComparedRun, ...]
    warnings: tuple[str, ...]


def _class_il(run: ComparedRun) -> str:
    found = run.results.class_incremental
    return percent(found.average_accuracy if found else None)


def _worst(run: ComparedRun) -> str:
    worst = run.results.worst_client
    return percent(worst[1] if worst else None)


MEASURES: Mapping[str, tuple[str, Callable[[ComparedRun], str]]] = {
    "run": ("run", lambda run: run.name),
    "method": ("", lambda run: run.results.config.method.name),
    "seed": ("", lambda run: str(run.results.seed)),
    "Task-IL accuracy": ("Task-IL", lambda run: percent(run.results.average_accuracy)),
    "Class-IL accuracy": ("Class-IL", _class_il),
    "zero-shot": ("", lambda run: percent(run.results.mean_zero_shot)),
    "backward transfer": ("backward", lambda run: points(run.results.backward_transfer)),
    "forward transfer": ("", lambda run: points(run.results.forward_transfer)),
    "forgetting": ("forgot", lambda run: percent(run.results.forgetting)),
    "worst client": ("worst", _worst),
    "epsilon": ("epsilon", lambda run: at_most(run.epsilon, 3)),
    "time": ("time", lambda run: time(run.results.seconds.get("total"))),
    "sent per client": ("", lambda run: size(sum(run.results.wire.bytes_up))),
    "received per client": ("", lambda run: size(run.results.wire.received)),
    "peak memory": ("", lambda run: size(run.results.peak_rss_bytes)),
}
"""Column of the page to the shorter one of the terminal (empty: it has none) and its figure."""


def compare(folders: Sequence[str]) -> Comparison:
    """Return the comparison of the runs in the folders.

    Raises:
        UserError: fewer than two runs, one twice, or one that has not finished.
    """
    paths = [at_home(folder).resolve() for folder in folders]
    if len(paths) < 2:
        raise UserError("deal compare: name two runs at least")
    if len(set(paths)) < len(paths):
        raise UserError("deal compare: names a run twice; name each once")
    results = [read_results(path) for path in paths]
    settings = [leaves(each.config) for each in results]
    differing = [
        key
        for key in settings[0]
        if key not in HIDDEN and len({json.dumps(own[key]) for own in settings}) > 1
    ]
    runs = tuple(
        ComparedRun(name, found, {key: own[key] for key in differing})
        for name, found, own in zip(_names(paths), results, settings, strict=True)
    )
    return Comparison(runs, (*_warnings(results), *_other_rows(paths, results[0].tasks)))


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


def _other_rows(paths: Sequence[Path], tasks: Sequence[str]) -> Iterator[str]:
    """Yield a line on tasks whose rows differ, by what the runs have noted of them."""
    rows = [rows_of([path]) for path in paths]
    for task in tasks:
        if len({each[task] for each in rows if task in each}) > 1:
            yield f"Task '{task}' has other rows in one run than in another."


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Print the measures of all runs in at most 80 columns, and what their epsilons mean."""
    for warning in comparison.warnings:
        print_line(console, f"warning: {warning}")
    meanings = list(dict.fromkeys(run.meaning for run in comparison.runs if run.meaning))
    short = {name: figure for name, figure in MEASURES.values() if name}
    rows = []
    for run in comparison.runs:
        mark = f" [{meanings.index(run.meaning) + 1}]" if run.meaning else ""
        cells = {name: figure(run) for name, figure in short.items()}
        rows.append(tuple({**cells, "epsilon": cells["epsilon"] + mark}.values()))
    right = (False, *[True] * (len(short) - 1))
    table = TextTable(tuple(short), right, tuple(rows))
    title = "Accuracies in %, backward transfer and forgetting in points"
    width = min(NARROW, console.width)
    console.print(text_table(table, title), width=width)
    for number, meaning in enumerate(meanings, start=1):
        print_line(console, f"[{number}] {meaning}")
    settings = comparison.runs[0].settings
    if settings:
        print_line(console, f"settings that differ: {', '.join(settings)}")


def comparison_page(comparison: Comparison) -> Page:
    """Return the page."""
    names = tuple(run.name for run in comparison.runs)
    settings: Block = Text("None.")
    if keys := comparison.runs[0].settings:
        rows = ((key, *(shown(run.settings[key]) for run in comparison.runs)) for key in keys)
        settings = Table("Settings in which the runs differ", ("key", *names), tuple(rows))
    return Page(
        kind="Comparison",
        title=f"{len(names)} runs side by side",
        subtitle=", ".join(names),
        sections=(
            Section("measures", "Measures", tuple(_measures(comparison))),
            Section("time", "Over time", tuple(_over_time(comparison))),
            Section("settings", "Settings that differ", (settings,)),
        ),
    )


def _measures(comparison: Comparison) -> Iterator[Block]:
    yield from map(Notice, comparison.warnings)
    rows = (tuple(figure(run) for _, figure in MEASURES.values()) for run in comparison.runs)
    yield Table("Measures of every run", tuple(MEASURES), tuple(rows))
    if meanings := [(f"epsilon of {r.name}", r.meaning) for r in comparison.runs if r.meaning]:
        yield Facts(tuple(meanings))
    yield Text(
        "Accuracies are in %, at the end of the run and over the test examples of all clients; "
        "transfer and forgetting in points. One run each: differences of a point or two may be "
        "chance. A study over seeds tells (deal study)."
    )


def _over_time(comparison: Comparison) -> Iterator[Block]:
    """Yield the mean accuracy on what is learnt so far, after each stage."""
    curves = {run.name: learnt_so_far(run.results) for run in comparison.runs}
    known = {name: values for name, values in curves.items() if len(values) > 1}
    if not known:
        yield Text("No run has learnt one task after another.")
        return
    last = max(map(len, known.values()))
    rows = tuple(
        (name, *(percent(values[i] if i < len(values) else None) for i in range(last)))
        for name, values in known.items()
    )
    stages = (f"stage {i}" for i in range(1, last + 1))
    yield lines(
        "Mean Task-IL accuracy on the tasks learnt so far, after each stage.",
        [
            Curve(
                name,
                tuple(map(float, range(1, len(values) + 1))),
                tuple(None if value is None else 100 * value for value in values),
            )
            for name, values in known.items()
        ],
        ("stages learnt", "accuracy (%)"),
        Table("Accuracy on the tasks learnt so far, in %", ("run", *stages), rows),
    )


def learnt_so_far(results: Results) -> list[float | None]:
    """Return the mean accuracy on the tasks learnt so far, after each stage; None: none is."""
    _, learnt = metrics.spans(results.tasks, [list(stage.work) for stage in results.stages])
    means: list[float | None] = []
    for i, row in enumerate(results.accuracy_matrix):
        done = [row[j] for j, end in enumerate(learnt) if end <= i]
        means.append(sum(done) / len(done) if done else None)
    return means
