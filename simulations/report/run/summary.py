"""Headline measures of a run, with the bounds that are known."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

from simulations.report.page.blocks import (
    Block,
    Notice,
    Section,
    Table,
    Text,
    Tile,
    Tiles,
    percent,
    pointer,
    points,
    size,
    time,
)
from simulations.report.run.record import RunRecord
from simulations.run.summary import unheard_text

EXPLANATION = (
    "Accuracies are in %, over the test examples of all clients. A task is told: an answer is one "
    "of its own labels. All labels: an answer is one of the labels of all tasks seen so far, and "
    "nobody tells the task. Transfer and forgetting are in points."
)


def summary(run: RunRecord) -> Section:
    """Return the section."""
    return Section("summary", "Summary", tuple(_blocks(run)))


def _blocks(run: RunRecord) -> Iterator[Block]:
    if run.state != "finished":
        yield _unfinished(run)
    yield Tiles(tuple(_tiles(run)))
    if run.results is not None and not run.matrix:
        yield Notice(
            "Accuracy is not known: clients keep their counts of right answers, or a sum of them "
            "was lost."
        )
    if run.results is not None and any(run.results.unheard):
        yield Notice(f"Counts of right answers: {unheard_text(run.results)}.", "warn")
    yield Text(EXPLANATION)
    if run.bounds:
        yield _bounds_table(run)


def _unfinished(run: RunRecord) -> Notice:
    rounds = f"{run.log.passed} of {run.log.planned} rounds"
    if run.state == "running":
        return Notice(f"The run is at work: {rounds} have ended. The page shows what is known.")
    why = f": {run.log.stopped}" if run.log.stopped else "; its process ended without a word"
    return Notice(
        f"The run stopped early, after {rounds}{why}. The page shows what was known by then; there "
        "are no results. The same command with --resume continues it.",
        "bad",
    )


def _tiles(run: RunRecord) -> Iterator[Tile]:
    if run.results is None:
        yield from _tiles_so_far(run)
        return
    found, start = run.results, [value for value in run.zero_shot if value is not None]
    if found.average_accuracy is not None:
        yield Tile(
            "Average accuracy",
            percent(found.average_accuracy, pointer("average_accuracy")),
            "%",
            "task told, at the end",
        )
    if found.class_incremental is not None:
        all_labels = found.class_incremental
        where = pointer("class_incremental", "average_accuracy")
        yield Tile(
            "Among all labels", percent(all_labels.average_accuracy, where), "%", "at the end"
        )
    if start:
        yield Tile("Zero-shot accuracy", percent(fmean(start)), "%", "before any training")
    for name in ("backward_transfer", "forward_transfer"):
        value = getattr(found, name)
        if value is not None:
            title = name.replace("_", " ").capitalize()
            yield Tile(title, points(value, pointer(name)), "points", TRANSFER[name])
    if found.forgetting is not None:
        yield Tile(
            "Forgetting",
            percent(found.forgetting, pointer("forgetting")),
            "points",
            "from the best to the end",
        )
    yield from _worst(run)
    yield Tile(
        "Sent per client",
        size(sum(found.wire.bytes_up)),
        "",
        "by a client that is asked in every round",
    )
    yield Tile("Time", time(found.seconds.get("total"), pointer("seconds", "total")))


TRANSFER = {
    "backward_transfer": "below 0: forgetting",
    "forward_transfer": "on tasks not yet learnt",
}


def _tiles_so_far(run: RunRecord) -> Iterator[Tile]:
    """Of a run that has not finished: from its log."""
    _, learnt = run.spans
    rows = run.matrix
    if rows:
        done = [j for j, i in enumerate(learnt) if i < len(rows)]
        known = [value for j in done if (value := rows[-1][j]) is not None]
        if known:
            note = f"{len(known)} of {len(run.tasks)} tasks learnt"
            yield Tile("Accuracy so far", percent(fmean(known)), "%", note)
    start = [value for value in run.zero_shot if value is not None]
    if start:
        yield Tile("Zero-shot accuracy", percent(fmean(start)), "%", "before any training")
    yield Tile("Rounds", f"{run.log.passed} of {run.log.planned}")


def _worst(run: RunRecord) -> Iterator[Tile]:
    averages = {name: value for name, value in run.averages.items() if value is not None}
    if averages and run.results is not None:
        worst = min(averages, key=lambda name: averages[name])
        yield Tile("Worst client", percent(averages[worst]), "%", f"client {worst}")


def _bounds_table(run: RunRecord) -> Table:
    results = run.results
    average = results.average_accuracy if results else None
    found = results.class_incremental if results else None
    start = [value for value in run.zero_shot if value is not None]
    rows = [
        ("zero-shot", percent(fmean(start) if start else None), percent(None)),
        ("this run", percent(average), percent(found.average_accuracy if found else None)),
        *(
            (f"{each.name} (bound)", percent(each.average_accuracy), percent(each.among_all))
            for each in run.bounds
        ),
    ]
    return Table(
        "Average accuracy beside the bounds of the same study and seed, in %",
        ("", "task told", "among all labels"),
        tuple(rows),
    )
