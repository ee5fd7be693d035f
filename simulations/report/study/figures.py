"""Drawings of a study: arms with intervals, differences, and what is left of a task with time."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from simulations.output.files import DASH, TextTable
from simulations.report.charts.drawings import Axes, Dot, Level, Line, Panel, dots, panels
from simulations.report.page.blocks import Figure, table
from simulations.study.results import CellResult
from simulations.study.statistics import estimate, paired_difference
from simulations.study.study_file import Study
from simulations.study.tables import (
    AVERAGE_ACCURACY,
    MEASURES,
    best_baseline,
    by_arm,
    pair,
    zero_shots,
)


def arms_figure(
    name: str, study: Study, cells: Sequence[CellResult], measure: str
) -> Figure | None:
    """Return every arm's mean and interval; None where nobody has the measure.

    Args:
        name: of the drawing.
        study: for the labels.
        cells: finished ones, under one setting.
        measure: of the tables of the study, an accuracy.
    """
    rows = []
    for arm, own in by_arm(study, cells).items():
        known = [v for c in own if (v := MEASURES[measure](c.outcome)) is not None]
        if known:
            found, kind = estimate(known), study.file.arms[arm]
            width = None if found.half_width is None else 100 * found.half_width
            series = 1 if arm == study.file.candidate else 0
            rows.append(Dot(study.label(arm), 100 * found.mean, width, series, not kind.contestant))
    if not rows:
        return None
    starts = [fmean(values) for own in zero_shots(cells).values() for values, _ in own]
    levels = [Level(100 * fmean(starts), "zero-shot")] if measure == AVERAGE_ACCURACY else []
    title = measure.capitalize() + ("" if measure == AVERAGE_ACCURACY else ", average accuracy")
    legend = " Orange: the candidate." if study.file.candidate else ""
    caption = f"{title} of every arm, mean and 95 % interval, in %. Hollow: bounds and references."
    alt = f"{title} of {len(rows)} arms with intervals"
    return Figure(
        f"{caption}{legend} The table below has the figures.",
        dots(name, alt, rows, "accuracy (%)", levels, wide=True),
        None,
        narrow=dots(f"{name}-narrow", alt, rows, "accuracy (%)", levels),
    )


def differences_figure(
    name: str, study: Study, cells: Sequence[CellResult], measure: str, behind: TextTable | None
) -> Figure | None:
    """Return the paired differences from the best baseline.

    Args:
        name: of the drawing.
        study: for the labels.
        cells: finished ones, under one setting.
        measure: an accuracy.
        behind: the table of the differences; None: there is nothing to compare.

    Returns:
        The figure; None: there is nothing to compare.
    """
    if behind is None:
        return None
    arms, value = study.file.arms, MEASURES[measure]
    accuracy = {
        arm: {pair(c): v for c in own if (v := value(c.outcome)) is not None}
        for arm, own in by_arm(study, cells).items()
        if not arms[arm].bound
    }
    accuracy = {arm: found for arm, found in accuracy.items() if found}
    best = best_baseline(study, {arm: accuracy[arm] for arm in accuracy if arms[arm].contestant})
    rows = []
    for arm, ours in accuracy.items():
        found = paired_difference(ours, accuracy[best]) if best and arm != best else None
        if found is not None:
            width = None if found.half_width is None else 100 * found.half_width
            series = 1 if arm == study.file.candidate else 0
            hollow = arms[arm].reference
            rows.append(Dot(study.label(arm), 100 * found.mean, width, series, hollow))
    if not rows:
        return None
    title = measure if measure == AVERAGE_ACCURACY else f"accuracy among {measure}"
    alt = f"Difference in {title} of {len(rows)} arms from {study.label(best)}"
    axis = f"points above {study.label(best)}"
    levels = [Level(0.0, "equal")]
    return Figure(
        f"Paired differences in {title} from {study.label(best)}, the best baseline, with 95 % "
        "intervals: one that crosses the line shows no difference.",
        dots(name, alt, rows, axis, levels, wide=True),
        table(behind, f"Paired differences in {title}, in points", words=(1,)),
        narrow=dots(f"{name}-narrow", alt, rows, axis, levels),
    )


def ages_figure(name: str, behind: TextTable) -> Figure | None:
    """Return, for each arm, what is left of a task with the tasks learnt since, the other arms in
    grey.

    Args:
        name: of the drawing.
        behind: the table of it.

    Returns:
        The figure; None: no arm has learnt one task after another.
    """
    each = []
    for label, *shares in behind.rows:
        values = tuple(None if cell == DASH else float(cell) for cell in shares)
        if any(value is not None for value in values):
            each.append(Panel(label, (Line(values),)))
    if not each or len(behind.columns) < 3:
        return None
    last = len(behind.columns) - 2
    step = max(1, -(-last // 6))
    ticks = tuple((i, str(i)) for i in range(0, last + 1, step))
    axes = Axes("tasks learnt since", "accuracy (%)", ticks, context=True)
    alt = f"Accuracy on a task of {len(each)} arms, up to {last} tasks after it was learnt"
    return Figure(
        "Accuracy on a task when it has just been learnt (0) and later, mean over tasks and cells; "
        "the other arms in grey.",
        panels(name, alt, each, axes),
        table(behind, "Accuracy on a task by the tasks learnt since, in %"),
        narrow=panels(f"{name}-narrow", alt, each, axes, wide=False),
    )
