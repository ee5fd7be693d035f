"""Labels: how well each is told, and which is taken for which; texts: how near to right ones."""

from __future__ import annotations

from collections.abc import Iterator

from deal_core.config.data import TextMeasureName
from deal_core.training.text_overlap import TEXT_MEASURES
from simulations.report.page.blocks import (
    Block,
    Cell,
    Folded,
    Heading,
    HeatCell,
    HeatMap,
    Notice,
    Number,
    Section,
    Table,
    Text,
    percent,
    whole,
)
from simulations.report.run.accuracy import LEVELS
from simulations.report.run.label_counts import TaskCounts, TextScores
from simulations.report.run.record import RunRecord

FEW = 20
"""Up to so many labels of a task are drawn as a confusion matrix."""
DIFFERENT = 0.005
"""Shares that differ by more are not the same up to rounding."""


def labels_section(run: RunRecord) -> Section:
    """Return the section."""
    return Section("labels", "Labels", tuple(_blocks(run)))


def _blocks(run: RunRecord) -> Iterator[Block]:
    counted = run.label_counts
    if counted is None:
        yield Text(
            "Not counted. Sites tell how many answers were right and no more; in a simulation, "
            "deal report RUN --labels answers the test texts anew, and counts for each label."
        )
        return
    yield Text(
        "At the end of the run, the task told; the test texts of a simulation, answered anew. "
        "Precision: of the answers with a label, the share that is right. Recall: of the texts "
        "with a label, the share that is answered with it. F1: their harmonic mean. All in %."
    )
    for number, task in enumerate(run.tasks, start=1):
        if task in counted.tasks:
            yield from _task(run, number, task, counted.tasks[task])
        if task in counted.texts:
            yield from _texts(run, number, task, counted.texts[task])


def _task(run: RunRecord, number: int, task: str, counts: TaskCounts) -> Iterator[Block]:
    yield Heading(f"{number} {task}")
    if counts.total:
        yield from _differs(run, task, counts.right / counts.total)
    table = scores(task, counts)
    if len(counts.labels) > FEW:
        yield Folded(f"{len(counts.labels)} labels, macro F1 {100 * counts.macro_f1:.1f}", (table,))
        return
    yield table
    yield confusion(task, counts)


def _texts(run: RunRecord, number: int, task: str, scores: TextScores) -> Iterator[Block]:
    yield Heading(f"{number} {task}")
    found: dict[TextMeasureName, float] = {
        "exact-match": scores.exact_match,
        "rouge-1": scores.rouge_1,
        "rouge-l": scores.rouge_l,
    }
    yield from _differs(run, task, found[run.experiment.data.measure(task)])
    yield Table(
        f"Texts written for {task}, in %",
        ("task", "test texts", *(TEXT_MEASURES[name].title for name in found)),
        ((task, whole(scores.total), *map(percent, found.values())),),
    )


def _differs(run: RunRecord, task: str, share: float) -> Iterator[Notice]:
    """Say so where the run has counted another share of right answers."""
    then = run.matrix[-1][run.tasks.index(task)] if run.matrix else None
    if then is not None and abs(then - share) > DIFFERENT:
        yield Notice(
            f"Answered anew, {100 * share:.1f} % are right; the run counted {100 * then:.1f} %. "
            "Rounding on another machine can do that, another test set too."
        )


def scores(task: str, counts: TaskCounts) -> Table:
    """Return a row for each label, and their mean."""
    rows: list[tuple[Cell, ...]] = []
    for i, label in enumerate(counts.labels):
        score = counts.of_label(i)
        figures = (percent(score.precision), percent(score.recall), percent(score.f1))
        rows.append((label, whole(score.true), *figures))
    rows.append(("macro mean", whole(counts.total), "–", "–", percent(counts.macro_f1)))
    columns = ("label", "test texts", "precision", "recall", "F1")
    return Table(f"Each label of {task}", columns, tuple(rows))


def confusion(task: str, counts: TaskCounts) -> HeatMap:
    """Return the confusion matrix; colours are shares of the row."""
    rows = []
    for label, row in zip(counts.labels, counts.counts, strict=True):
        total = sum(row)
        cells = tuple(
            HeatCell(Number(n, str(n)), min(LEVELS - 1, LEVELS * n // total) if total else 0)
            for n in row
        )
        rows.append((label, cells))
    return HeatMap(
        f"{task}: texts by true label (row) and answer (column); colour: share of the row",
        "true label",
        tuple(counts.labels),
        tuple(rows),
        "0 %",
        "100 %",
        marked=False,
    )
