"""The page of a study, and of what privacy costs in it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from simulations.output import DASH, read_stored
from simulations.report.blocks import (
    Block,
    Bullets,
    Drawing,
    Heading,
    Page,
    Section,
    Text,
)
from simulations.report.charts import Curve, Dot, dots, lines
from simulations.study import tables
from simulations.study.grid import Study
from simulations.study.results import STUDY_JSON, CellResult, StudyResults
from simulations.study.statistics import estimate


def study_page(folder: Path) -> Page:
    """Return the page of the study in a folder. UserError: its file cannot be read."""
    path = folder / STUDY_JSON
    results = read_stored(StudyResults, path, "figures of a study")
    study, cells = Study(results.study, path, results.file), results.standing
    complete = len(cells) == results.wanted
    seeds = ", ".join(map(str, sorted({cell.seed for cell in cells})))
    return Page(
        kind="Study",
        title=results.study,
        subtitle=results.description,
        sections=tuple(_study_sections(folder, study, results)),
        state="complete" if complete else f"{len(cells)} of {results.wanted} cells",
        tone="good" if complete else "warn",
        meta=(
            f"experiment {Path(results.file.experiment).stem}",
            f"{len({cell.arm for cell in cells})} arms",
            f"seeds {seeds or DASH}",
            *[f"{len({cell.order for cell in cells})} orders"] * bool(results.file.orders),
            *[f"{len({cell.setting for cell in cells})} settings"] * bool(results.file.settings),
        ),
        source=STUDY_JSON,
    )


def _study_sections(folder: Path, study: Study, results: StudyResults) -> Iterator[Section]:
    cells = results.standing
    yield Section("summary", "Summary", tuple(_summary(study, results)))
    if study.file.epsilons and cells:
        yield Section("budgets", "Accuracy against epsilon", tuple(_budgets(study, cells)))
    settings = [name for name in study.file.settings if any(c.setting == name for c in cells)]
    if len(settings) < 2 and cells:
        for name, blocks in _parts(study, cells).items():
            yield Section(name.lower(), name, tuple(blocks))
    elif cells:
        yield Section("settings", "Settings", tables.setting_tables(study, cells))
        for name in settings:
            parts = _parts(study, [cell for cell in cells if cell.setting == name])
            told = [block for part, own in parts.items() for block in (Heading(part), *own)]
            yield Section(f"setting-{name}", f"Setting {name}", tuple(told))
    gone = {cell.name for cell in results.cells} - {cell.name for cell in cells}
    runs = [page.relative_to(folder) for page in sorted(folder.glob("cells/**/report.html"))]
    links = [("/".join(run.parts[1:-1]), str(run)) for run in runs if run.parts[1] not in gone]
    if links:
        yield Section("runs", "Runs", (Bullets(tuple(links)),))


def _summary(study: Study, results: StudyResults) -> Iterator[Block]:
    missing = results.wanted - len(results.standing)
    if missing > 0:
        yield Text(
            f"{missing} of {results.wanted} cells have not finished, and are not on this page. The "
            "same command continues them.",
            "warn",
        )
    yield Text(tables.EXPLANATION)
    if tables.CLASS_IL in tables.measures_of(results.standing):
        yield Text(tables.CLASS_IL_EXPLAINED)
    if texts := tables.mixed_measures(results.standing):
        yield Text(texts)
    if study.file.candidate:
        yield Text(
            f"The candidate, which is judged, is {study.label(study.file.candidate)}; it is never "
            "itself the best baseline."
        )


def _parts(study: Study, cells: Sequence[CellResult]) -> dict[str, list[Block]]:
    """Return name and blocks of each part of what was found under one setting."""
    known = [
        name for name in (tables.TASK_IL, tables.CLASS_IL) if name in tables.measures_of(cells)
    ]
    arms: list[Block] = [_arms_drawing(study, cells, name) for name in known]
    arms += [tables.arms_table(study, cells), *map(Text, tables.on_all_tests(study, cells))]
    if tables.CLASS_IL in known:
        arms.append(tables.class_il_table(study, cells))
    told = [part for name in known for part in tables.significance(study, cells, name)]
    return {
        "Arms": arms,
        "Differences": [Text(part) if isinstance(part, str) else part for part in told],
        "Forgetting": list(_forgetting(study, cells)),
        "Cost": [tables.cost_table(study, cells)],
    }


def _arms_drawing(study: Study, cells: Sequence[CellResult], measure: str) -> Drawing:
    """Return every arm's mean and interval."""
    rows = []
    for arm, own in tables.by_arm(study, cells).items():
        known = [v for c in own if (v := tables.MEASURES[measure](c.outcome)) is not None]
        if known:
            found, marked = estimate(known), arm == study.file.candidate
            width = None if found.half_width is None else 100 * found.half_width
            hollow = not study.file.arms[arm].contestant
            rows.append(Dot(study.label(arm), 100 * found.mean, width, marked, hollow))
    return dots(
        f"{measure} of every arm, mean and 95 % interval. Hollow: bounds and "
        f"references.{' Orange: the candidate.' * bool(study.file.candidate)}",
        rows,
        "accuracy (%)",
        (100 * fmean(tables.zero_shots(cells)), "zero-shot") if measure == tables.TASK_IL else None,
    )


def _forgetting(study: Study, cells: Sequence[CellResult]) -> Iterator[Block]:
    """Yield what is left of a task with the tasks learnt since: contestants drawn, and a table."""
    table = tables.age_table(study, cells)
    if table is None:
        yield Text("No arm has learnt one task after another.")
        return
    contestants = {study.label(arm) for arm, own in study.file.arms.items() if own.contestant}
    if len(table.columns) > 2:
        ages = range(len(table.columns) - 1)
        curves = [
            Curve(label, ages, [None if cell == DASH else float(cell) for cell in shares])
            for label, *shares in table.rows
            if label in contestants
        ]
        axes = ("tasks learnt since", "accuracy (%)")
        yield lines(f"{table.caption}: contestants, means over tasks and cells", curves, axes)
    yield table


def _budgets(study: Study, cells: Sequence[CellResult]) -> Iterator[Block]:
    """Yield measures against epsilon, drawn, and a table of each arm."""
    if any(cell.privacy and cell.privacy.simulation_only for cell in cells):
        text = "Simulation only: the noise came from a seed, so nothing is guaranteed."
        yield Text(text, "warn")
    yield Text(tables.BUDGETS_EXPLAINED)
    arms = tables.by_arm(study, cells)
    for measure in tables.BUDGET_MEASURES:
        name = f"{measure} ({'points' if measure == 'forgetting' else '%'})"
        curves, levels = [], []
        for arm, own in arms.items():
            label, found = study.label(arm), {}
            for epsilon, under in tables.by_epsilon(study, own).items():
                known = [v for c in under if (v := tables.MEASURES[measure](c.outcome)) is not None]
                if known:
                    found[epsilon] = estimate(known)
            if math.inf in found:
                levels.append((100 * found.pop(math.inf).mean, f"{label}, no privacy"))
            if found:
                means = [100 * each.mean for each in found.values()]
                widths = [100 * (each.half_width or 0.0) for each in found.values()]
                curves.append(Curve(label, list(found), means, widths))
        if curves or levels:
            caption = f"{name[0].upper()}{name[1:]} against epsilon, means with 95 % intervals."
            yield lines(caption, curves, ("epsilon", name), levels=levels, budgets=True)
    for arm, own in arms.items():
        yield tables.budget_table(study, arm, own)
        yield from map(Text, tables.meanings(own))
    yield Text(tables.sweep_text(cells))
