"""The page of a study, and of what privacy costs in it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from deal_core.errors import UserError
from simulations.output.files import DASH, read_stored
from simulations.report.blocks import (
    Block,
    Figure,
    Folded,
    Heading,
    Links,
    Notice,
    Page,
    Section,
    Table,
    Text,
    from_markdown,
    plain,
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
from simulations.study.statistics import Estimate, estimate
from simulations.study.study_file import Study
from simulations.study.tables import (
    ALL_LABELS,
    ALL_LABELS_EXPLAINED,
    AVERAGE_ACCURACY,
    EXPLANATION,
    MEASURES,
    age_table,
    all_labels_table,
    arms_table,
    best_settings,
    by_arm,
    cost_table,
    measures_of,
    precisions,
    setting_table,
    significance,
    zero_shots,
)

REPORT = "report.html"
ACCURACIES = {AVERAGE_ACCURACY: "Task-IL accuracy", ALL_LABELS: "Class-IL accuracy"}


def study_page(folder: Path) -> Page:
    """Return the page of the study in a folder.

    Raises:
        UserError: its file cannot be read.
    """
    path = folder / STUDY_JSON
    results = read_stored(StudyResults, path, "figures of a study")
    if results.file is None:
        raise UserError(f"{path}: has no study file in it; run the study again")
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
        for name, blocks in _parts(study, cells, ""):
            yield Section(name.lower(), name, blocks)
    elif cells:
        best = from_markdown(best_settings(study, cells), "Best setting of every arm")
        every = from_markdown(setting_table(study, cells), f"{ACCURACIES[AVERAGE_ACCURACY]} in %")
        folded = []
        for setting in settings:
            parts = _parts(study, [c for c in cells if c.setting == setting], f"; {setting}")
            told = (block for name, part in parts for block in (Heading(name), *part))
            folded.append(Folded(f"Setting {setting}", tuple(told)))
        yield Section("settings", "Settings", (*best, *every, *folded))
    gone = {cell.name for cell in results.cells} - {cell.name for cell in cells}
    runs = (page.parent.relative_to(folder) for page in sorted(folder.glob(f"cells/**/{REPORT}")))
    links = tuple(
        (str(run / REPORT), "/".join(run.parts[1:])) for run in runs if run.parts[1] not in gone
    )
    if links:
        yield Section("runs", "Runs", (Links(links),))


def _summary(study: Study, results: StudyResults) -> Iterator[Block]:
    missing = results.wanted - len(results.standing)
    if missing > 0:
        yield Notice(
            f"{missing} of {results.wanted} cells have not finished, and are not on this page. The "
            "same command continues them."
        )
    more = ALL_LABELS_EXPLAINED if ALL_LABELS in measures_of(results.standing) else ""
    yield Text(plain(EXPLANATION + more))
    yield from (Text(plain(line)) for line in precisions(results))
    if study.file.candidate:
        yield Text(
            f"The candidate, which is judged, is {study.label(study.file.candidate)}; it is never "
            "itself the best baseline."
        )


def _parts(
    study: Study, cells: Sequence[CellResult], setting: str
) -> Iterator[tuple[str, tuple[Block, ...]]]:
    """Yield name and blocks of each part of what was found under one setting; ``setting`` is put
    behind captions."""
    known = [name for name in ACCURACIES if name in measures_of(cells)]
    figures = [_arms_figure(study, cells, name, setting) for name in known]
    arms = f"Arms and measures; accuracies in %, the others in points{setting}"
    class_il = f"The same, Class-IL{setting}"
    yield (
        "Arms",
        (
            *(figure for figure in figures if figure),
            *from_markdown(arms_table(study, cells), arms),
            *from_markdown(all_labels_table(study, cells) if len(known) > 1 else (), class_il),
        ),
    )
    differences: list[Block] = []
    for name in known:
        caption = f"Paired differences in {ACCURACIES[name]}, in points{setting}"
        differences += from_markdown(significance(study, cells, name), caption)
    yield "Differences", tuple(differences)
    ages = f"Accuracy on a task by the tasks learnt since, in %{setting}"
    yield "Forgetting", tuple(_forgetting(study, from_markdown(age_table(study, cells), ages)))
    cost = f"Means per cell; the largest peak of memory{setting}"
    yield "Cost", from_markdown(cost_table(study, cells), cost)


def _arms_figure(
    study: Study, cells: Sequence[CellResult], measure: str, setting: str
) -> Figure | None:
    """Return every arm's mean and interval; None: no cell has the measure."""
    rows = []
    for arm, own in by_arm(study, cells).items():
        known = [v for c in own if (v := MEASURES[measure](c.outcome)) is not None]
        if known:
            found, marked = estimate(known), arm == study.file.candidate
            width = None if found.half_width is None else 100 * found.half_width
            hollow = not study.file.arms[arm].contestant
            rows.append(Dot(study.label(arm), 100 * found.mean, width, marked, hollow))
    if not rows:
        return None
    starts = zero_shots(cells)
    return dots(
        f"{ACCURACIES[measure]} of every arm, mean and 95 % interval. Hollow: bounds and "
        f"references.{' Orange: the candidate.' * bool(study.file.candidate)}{setting}",
        rows,
        "accuracy (%)",
        (100 * fmean(starts), "zero-shot") if measure == AVERAGE_ACCURACY else None,
    )


def _forgetting(study: Study, blocks: tuple[Block, ...]) -> Iterator[Block]:
    """Yield what is left of a task with the tasks learnt since: contestants drawn, and a table."""
    contestants = {study.label(arm) for arm, own in study.file.arms.items() if own.contestant}
    for block in blocks:
        if isinstance(block, Table) and len(block.columns) > 2:
            curves = []
            for label, *shares in block.rows:
                values = tuple(None if cell == DASH else float(cell) for cell in shares)
                if label in contestants:
                    curves.append(Curve(label, tuple(map(float, range(len(values)))), values))
            caption = f"{block.caption}: contestants, means over tasks and cells"
            yield lines(caption, curves, ("tasks learnt since", "accuracy (%)"))
        yield block


PANELS = {
    AVERAGE_ACCURACY: "Task-IL accuracy (%)",
    ALL_LABELS: "Class-IL accuracy (%)",
    "forgetting": "forgetting (points)",
    "worst client": "worst client (%)",
}


def _budgets(study: Study, cells: Sequence[CellResult]) -> Iterator[Block]:
    """Yield measures against epsilon, drawn, and a table of each arm."""
    if any(cell.privacy and cell.privacy.simulation_only for cell in cells):
        yield Notice("Simulation only: the noise came from a seed, so nothing is guaranteed.")
    yield Text(plain(BUDGETS_EXPLAINED))
    yield from (Text(text) for text in meanings(cells))
    for measure, name in PANELS.items():
        curves, levels = [], []
        for arm, own in by_arm(study, cells).items():
            found = [
                (epsilon, estimate(known))
                for epsilon, under in by_epsilon(study, own).items()
                if (known := [v for c in under if (v := MEASURES[measure](c.outcome)) is not None])
            ]
            label = study.label(arm)
            private = [(x, mean) for x, mean in found if math.isfinite(x)]
            free = [mean for x, mean in found if not math.isfinite(x)]
            levels += [(100 * mean.mean, f"{label}, no privacy") for mean in free]
            if private:
                curves.append(_curve(label, private))
        if curves or levels:
            yield lines(
                f"{name[0].upper()}{name[1:]} against epsilon, means with 95 % intervals.",
                curves,
                ("epsilon", name),
                levels=levels,
                budgets=True,
            )
    for arm, own in by_arm(study, cells).items():
        caption = f"{study.label(arm)} under each budget; accuracies in %"
        yield from from_markdown(budget_table(study, own), caption)
    yield Text(sweep_text(cells))


def _curve(label: str, private: Sequence[tuple[float, Estimate]]) -> Curve:
    means = [100 * found.mean for _, found in private]
    widths = [100 * (found.half_width or 0.0) for _, found in private]
    return Curve(
        label,
        tuple(x for x, _ in private),
        tuple(means),
        tuple(mean - width for mean, width in zip(means, widths, strict=True)),
        tuple(mean + width for mean, width in zip(means, widths, strict=True)),
    )
