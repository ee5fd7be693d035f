"""A comparison as a page."""

from __future__ import annotations

from collections.abc import Iterator

from deal_core import metrics
from simulations.report.charts.drawings import Axes, Dot, Line, Panel, dots, panels
from simulations.report.comparison.compared import ComparedRun, Comparison
from simulations.report.page.blocks import (
    Block,
    Cell,
    Facts,
    Figure,
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
from simulations.report.run.settings import shown

EXPLANATION = (
    "Accuracies are in %, at the end of the run and over the test examples of all clients; "
    "transfer and forgetting in points. One run each: differences of a point or two may be "
    "chance. A study over seeds tells (deal study)."
)


def comparison_page(comparison: Comparison) -> Page:
    """Return the page."""
    names = ", ".join(run.name for run in comparison.runs)
    return Page(
        kind="Comparison",
        title=f"{len(comparison.runs)} runs side by side",
        subtitle=names,
        sections=(
            Section("measures", "Measures", tuple(_measures(comparison))),
            Section("time", "Over time", tuple(_over_time(comparison))),
            Section("cost", "Cost", (_cost(comparison),)),
            Section("settings", "Settings that differ", tuple(_settings(comparison))),
        ),
    )


def _measures(comparison: Comparison) -> Iterator[Block]:
    for warning in comparison.warnings:
        yield Notice(warning)
    rows = [
        Dot(
            run.name,
            100 * run.results.average_accuracy,
            before=_percent(run.results.mean_zero_shot),
        )
        for run in comparison.runs
        if run.results.average_accuracy is not None
    ]
    if rows:
        alt = f"Average accuracy of {len(rows)} runs"
        yield Figure(
            "Average accuracy, the task told. Hollow: zero-shot. The table below has the figures.",
            dots("compared", alt, rows, "accuracy (%)", wide=True),
            None,
            narrow=dots("compared-narrow", alt, rows, "accuracy (%)"),
        )
    columns = (
        *("run", "method", "seed", "average accuracy", "all labels", "zero-shot"),
        *("backward transfer", "forward transfer", "forgetting", "worst client", "epsilon"),
    )
    table = tuple(_row(run) for run in comparison.runs)
    yield Table("Measures of every run", columns, table, words=(1,))
    meanings = {run.name: run.guarantee for run in comparison.runs if run.guarantee}
    if meanings:
        yield Facts(tuple((f"epsilon of {name}", text) for name, text in meanings.items()))
    yield Text(EXPLANATION)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _row(run: ComparedRun) -> tuple[Cell, ...]:
    found = run.results
    return (
        run.name,
        found.config.method.name,
        str(found.seed),
        percent(found.average_accuracy),
        percent(run.among_all),
        percent(run.results.mean_zero_shot),
        points(found.backward_transfer),
        points(found.forward_transfer),
        percent(found.forgetting),
        percent(run.worst_client),
        at_most(run.epsilon, 4),
    )


def _cost(comparison: Comparison) -> Table:
    columns = ("run", "time", "sent per client", "received per client", "peak memory")
    rows = tuple(
        (
            run.name,
            time(run.seconds),
            size(sum(run.results.wire.bytes_up)),
            size(run.results.wire.received),
            size(run.results.peak_rss_bytes),
        )
        for run in comparison.runs
    )
    return Table("What every run took", columns, rows)


def _over_time(comparison: Comparison) -> Iterator[Block]:
    """The mean accuracy on what is learnt so far, after each stage."""
    curves = {run.name: learnt_so_far(run) for run in comparison.runs}
    known = {name: values for name, values in curves.items() if len(values) > 1}
    if not known:
        yield Text("No run has learnt one task after another.")
        return
    each = [
        Panel(name, (Line(tuple(_percent(value) for value in values), start=1),))
        for name, values in known.items()
    ]
    last = max(len(values) for values in known.values())
    axes = Axes("stages learnt", "accuracy (%)", context=True)
    alt = f"Accuracy on the tasks learnt so far of {len(each)} runs"
    rows = tuple(
        (name, *(percent(values[i] if i < len(values) else None) for i in range(last)))
        for name, values in known.items()
    )
    stages = (f"stage {i}" for i in range(1, last + 1))
    yield Figure(
        "Mean accuracy on the tasks learnt so far, after each stage, the task told; the other runs "
        "in grey.",
        panels("learnt", alt, each, axes),
        Table("Accuracy on the tasks learnt so far, in %", ("run", *stages), rows),
        narrow=panels("learnt-narrow", alt, each, axes, wide=False),
    )


def learnt_so_far(run: ComparedRun) -> list[float | None]:
    """Return the mean accuracy on the tasks learnt so far, after each stage; None: none is."""
    found = run.results
    if not found.accuracy_matrix:
        return []
    _, learnt = metrics.spans(found.tasks, [list(stage.work) for stage in found.stages])
    means: list[float | None] = []
    for i, row in enumerate(found.accuracy_matrix):
        done = [row[j] for j, end in enumerate(learnt) if end <= i]
        means.append(sum(done) / len(done) if done else None)
    return means


def _settings(comparison: Comparison) -> Iterator[Block]:
    if not comparison.keys:
        yield Text("None.")
        return
    names = tuple(run.name for run in comparison.runs)
    rows = tuple(
        (key, *(shown(run.settings[key]) for run in comparison.runs)) for key in comparison.keys
    )
    words = tuple(range(1, len(names) + 1))
    yield Table("Settings in which the runs differ", ("key", *names), rows, words)
