"""The page of a study, and of what privacy costs in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean

from simulations.output.files import DASH, TextTable, read_stored
from simulations.report.blocks import (
    Block,
    Bullets,
    Drawing,
    Folded,
    Heading,
    Page,
    Section,
    Table,
    Text,
)
from simulations.report.charts import Curve, Dot, dots, lines
from simulations.study.budgets import (
    BUDGETS_EXPLAINED,
    budget_table,
    by_epsilon,
    meanings,
    sweep_text,
)
from simulations.study.results import STUDY_JSON, CellResult, StudyResults
from simulations.study.statistics import estimate
from simulations.study.study_file import Study
from simulations.study.tables import (
    CLASS_IL,
    CLASS_IL_EXPLAINED,
    EXPLANATION,
    MEASURES,
    TASK_IL,
    Part,
    age_table,
    arms_table,
    best_settings,
    by_arm,
    class_il_table,
    cost_table,
    measures_of,
    on_all_tests,
    precisions,
    setting_table,
    significance,
    zero_shots,
)

PANELS = {
    TASK_IL: f"{TASK_IL} (%)",
    CLASS_IL: f"{CLASS_IL} (%)",
    "forgetting": "forgetting (points)",
    "worst client": "worst client (%)",
}


def study_page(folder: Path) -> Page:
    """Return the page of the study in a folder.

    Raises:
        UserError: its file cannot be read.
    """
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
        for name, blocks in _parts(study, cells, "").items():
            yield Section(name.lower(), name, tuple(blocks))
    elif cells:
        shown = [
            _table("Best setting of every arm", best_settings(study, cells)),
            _table(f"{TASK_IL} in %", setting_table(study, cells)),
        ]
        folded = []
        for setting in settings:
            parts = _parts(study, [c for c in cells if c.setting == setting], f"; {setting}")
            told = [block for name, part in parts.items() for block in (Heading(name), *part)]
            folded.append(Folded(f"Setting {setting}", tuple(told)))
        yield Section("settings", "Settings", (*shown, *folded))
    gone = {cell.name for cell in results.cells} - {cell.name for cell in cells}
    runs = [page.relative_to(folder) for page in sorted(folder.glob("cells/**/report.html"))]
    links = [("/".join(run.parts[1:-1]), str(run)) for run in runs if run.parts[1] not in gone]
    if links:
        yield Section("runs", "Runs", (Bullets(tuple(links)),))


def _table(caption: str, table: TextTable) -> Table:
    return Table(caption, table.columns, table.rows)


def _shown(caption: str, parts: Iterable[Part]) -> list[Block]:
    """Return paragraphs and tables as blocks; all tables have the caption."""
    return [Text(part) if isinstance(part, str) else _table(caption, part) for part in parts]


def _summary(study: Study, results: StudyResults) -> Iterator[Block]:
    missing = results.wanted - len(results.standing)
    if missing > 0:
        yield Text(
            f"{missing} of {results.wanted} cells have not finished, and are not on this page. The "
            "same command continues them.",
            "warn",
        )
    yield Text(EXPLANATION)
    if CLASS_IL in measures_of(results.standing):
        yield Text(CLASS_IL_EXPLAINED)
    yield from map(Text, precisions(results))
    if study.file.candidate:
        yield Text(
            f"The candidate, which is judged, is {study.label(study.file.candidate)}; it is never "
            "itself the best baseline."
        )


def _parts(study: Study, cells: Sequence[CellResult], setting: str) -> dict[str, list[Block]]:
    """Return name and blocks of each part of what was found under one setting; ``setting`` is put
    behind captions."""
    known = [name for name in (TASK_IL, CLASS_IL) if name in measures_of(cells)]
    arms: list[Block] = [_arms_drawing(study, cells, name, setting) for name in known]
    caption = f"Arms and measures; accuracies in %, the others in points{setting}"
    arms += _shown(caption, [arms_table(study, cells), *on_all_tests(study, cells)])
    differences: list[Block] = []
    if CLASS_IL in known:
        arms.append(_table(f"The same, Class-IL{setting}", class_il_table(study, cells)))
    for name in known:
        caption = f"Paired differences in {name}, in points{setting}"
        differences += _shown(caption, significance(study, cells, name))
    cost = _table(f"Means per cell; the largest peak of memory{setting}", cost_table(study, cells))
    return {
        "Arms": arms,
        "Differences": differences,
        "Forgetting": list(_forgetting(study, cells, setting)),
        "Cost": [cost],
    }


def _arms_drawing(study: Study, cells: Sequence[CellResult], measure: str, setting: str) -> Drawing:
    """Return every arm's mean and interval."""
    rows = []
    for arm, own in by_arm(study, cells).items():
        known = [v for c in own if (v := MEASURES[measure](c.outcome)) is not None]
        if known:
            found, marked = estimate(known), arm == study.file.candidate
            width = None if found.half_width is None else 100 * found.half_width
            hollow = not study.file.arms[arm].contestant
            rows.append(Dot(study.label(arm), 100 * found.mean, width, marked, hollow))
    return dots(
        f"{measure} of every arm, mean and 95 % interval. Hollow: bounds and "
        f"references.{' Orange: the candidate.' * bool(study.file.candidate)}{setting}",
        rows,
        "accuracy (%)",
        (100 * fmean(zero_shots(cells)), "zero-shot") if measure == TASK_IL else None,
    )


def _forgetting(study: Study, cells: Sequence[CellResult], setting: str) -> Iterator[Block]:
    """Yield what is left of a task with the tasks learnt since: contestants drawn, and a table."""
    table = age_table(study, cells)
    if table is None:
        yield Text("No arm has learnt one task after another.")
        return
    caption = f"Accuracy on a task by the tasks learnt since, in %{setting}"
    contestants = {study.label(arm) for arm, own in study.file.arms.items() if own.contestant}
    if len(table.columns) > 2:
        ages = range(len(table.columns) - 1)
        curves = [
            Curve(label, ages, [None if cell == DASH else float(cell) for cell in shares])
            for label, *shares in table.rows
            if label in contestants
        ]
        axes = ("tasks learnt since", "accuracy (%)")
        yield lines(f"{caption}: contestants, means over tasks and cells", curves, axes)
    yield _table(caption, table)


def _budgets(study: Study, cells: Sequence[CellResult]) -> Iterator[Block]:
    """Yield measures against epsilon, drawn, and a table of each arm."""
    if any(cell.privacy and cell.privacy.simulation_only for cell in cells):
        text = "Simulation only: the noise came from a seed, so nothing is guaranteed."
        yield Text(text, "warn")
    yield Text(BUDGETS_EXPLAINED)
    arms = by_arm(study, cells)
    for measure, name in PANELS.items():
        curves, levels = [], []
        for arm, own in arms.items():
            label, found = study.label(arm), {}
            for epsilon, under in by_epsilon(study, own).items():
                known = [v for c in under if (v := MEASURES[measure](c.outcome)) is not None]
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
        caption = f"{study.label(arm)} under each budget; accuracies in %"
        yield _table(caption, budget_table(study, own))
        yield from map(Text, meanings(own))
    yield Text(sweep_text(cells))
