"""The page of a study."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from simulations.output.files import TextTable, blocks
from simulations.report.page.blocks import (
    Block,
    Folded,
    Heading,
    Links,
    Notice,
    Page,
    Section,
    Table,
    Text,
    Tile,
    Tiles,
    from_markdown,
    percent,
    plain,
    table,
    whole,
)
from simulations.report.study.figures import ages_figure, arms_figure, differences_figure
from simulations.report.study.record import StudyRecord
from simulations.study.results import CellResult
from simulations.study.statistics import estimate
from simulations.study.study_file import Study
from simulations.study.tables import (
    ALL_LABELS,
    ALL_LABELS_EXPLAINED,
    AVERAGE_ACCURACY,
    EXPLANATION,
    age_table,
    all_labels_table,
    arms_table,
    best_of,
    best_setting,
    best_settings,
    by_arm,
    cost_table,
    curves,
    measures_of,
    pair,
    precisions,
    setting_table,
    significance,
)

REPORT = "report.html"
ARMS = "Arms and measures; accuracies in %, the others in points"
AMONG_ALL_LABELS = "The same among all labels seen so far, the task not told"
AGES = "Accuracy on a task by the tasks learnt since, in %"
COST = "Means per cell; the largest peak of memory"
DIFFERENCES = {
    AVERAGE_ACCURACY: "Paired differences in average accuracy, in points",
    ALL_LABELS: "Paired differences in accuracy among all labels, in points",
}


def study_page(record: StudyRecord) -> Page:
    """Return the page."""
    results = record.results
    complete = len(results.cells) == results.wanted
    return Page(
        kind="Study",
        title=results.study,
        subtitle=results.description,
        sections=tuple(_sections(record)),
        state="complete" if complete else f"{len(results.cells)} of {results.wanted} cells",
        tone="good" if complete else "warn",
        meta=tuple(_meta(record)),
        source="study.json",
    )


def _meta(record: StudyRecord) -> Iterator[str]:
    cells = record.results.cells
    seeds = sorted({cell.seed for cell in cells})
    yield f"experiment {Path(record.study.file.experiment).stem}"
    yield f"{len({cell.arm for cell in cells})} arms"
    yield f"seeds {', '.join(map(str, seeds)) or '–'}"
    if orders := {cell.order for cell in cells if cell.order}:
        yield f"{len(orders)} orders"
    if settings := {cell.setting for cell in cells if cell.setting}:
        yield f"{len(settings)} settings"


def _sections(record: StudyRecord) -> Iterator[Section]:
    yield Section("summary", "Summary", tuple(_summary(record)))
    settings = [name for name in record.settings if record.cells(name)]
    if len(settings) == 1:
        yield from _of_setting(record, record.cells(settings[0]))
    elif settings:
        yield Section("settings", "Settings", tuple(_settings(record, settings)))
    if links := _links(record):
        yield Section("runs", "Runs", (Links(links),))


def _summary(record: StudyRecord) -> Iterator[Block]:
    results, study = record.results, record.study
    missing = results.wanted - len(results.cells)
    if missing > 0:
        yield Notice(
            f"{missing} of {results.wanted} cells have not finished, and are not on this page. The "
            "same command continues them."
        )
    if record.gone:
        yield Text(
            "Cells of study.json that are no longer in the study, and on no part of this page: "
            f"{len(record.gone)}."
        )
    yield Tiles(tuple(_tiles(record)))
    more = ALL_LABELS_EXPLAINED if ALL_LABELS in measures_of(results.cells) else ""
    yield Text(plain(EXPLANATION + more))
    yield from (Text(plain(line)) for line in precisions(results))
    if study.file.candidate:
        yield Text(
            f"The candidate, which is judged, is {study.label(study.file.candidate)}; it is never "
            "itself the best baseline."
        )


def _tiles(record: StudyRecord) -> Iterator[Tile]:
    results, study = record.results, record.study
    yield Tile("Cells", whole(len(results.cells)), f"of {results.wanted}")
    arms = _at_their_best(record)
    named = {"Candidate": study.file.candidate, "Best contestant": _best(study, arms)}
    for title, arm in named.items():
        if arm in arms:
            found = estimate([cell.outcome.average_accuracy for cell in arms[arm]])
            width = "" if found.half_width is None else f"± {100 * found.half_width:.1f} "
            under = f", setting {arms[arm][0].setting}" if len(record.settings) > 1 else ""
            yield Tile(title, percent(found.mean), f"{width}%", study.label(arm) + under)


def _at_their_best(record: StudyRecord) -> dict[str, list[CellResult]]:
    """Return arm to its cells; of several settings, those of its best one."""
    study, cells = record.study, record.results.cells
    if len(record.settings) < 2:
        return by_arm(study, cells)
    best = best_setting(study, cells)
    return by_arm(study, [cell for cell in cells if cell.setting == best.get(cell.arm)])


def _best(study: Study, arms: Mapping[str, Sequence[CellResult]]) -> str:
    """Return the contestant that is best on the cells that all contestants have."""
    return best_of(
        {
            arm: {pair(cell): cell.outcome.average_accuracy for cell in own}
            for arm, own in arms.items()
            if study.file.arms[arm].contestant
        }
    )


def _of_setting(record: StudyRecord, cells: list[CellResult]) -> Iterator[Section]:
    """Yield the sections of the cells of a study with one setting."""
    study = record.study
    yield Section("arms", "Arms", tuple(_arms(record, cells)))
    yield Section("differences", "Differences", tuple(_differences(record, cells)))
    yield Section("forgetting", "Forgetting", tuple(_forgetting(record, cells)))
    yield Section("cost", "Cost", from_markdown(cost_table(study, cells), COST))


def _arms(record: StudyRecord, cells: list[CellResult]) -> Iterator[Block]:
    names = [AVERAGE_ACCURACY] + [name for name in measures_of(cells) if name == ALL_LABELS]
    for number, name in enumerate(names):
        figure = arms_figure(f"arms-{number}", record.study, cells, name)
        if figure is not None:
            yield figure
    yield from from_markdown(arms_table(record.study, cells), ARMS)
    if ALL_LABELS in names:
        yield from from_markdown(all_labels_table(record.study, cells), AMONG_ALL_LABELS)


def _differences(record: StudyRecord, cells: list[CellResult]) -> Iterator[Block]:
    for name in (AVERAGE_ACCURACY, ALL_LABELS):
        if name in measures_of(cells):
            lines = list(significance(record.study, cells, name))
            place = f"differences-{'own' if name == AVERAGE_ACCURACY else 'all'}"
            figure = differences_figure(place, record.study, cells, name, _first_table(lines))
            told = from_markdown(lines, DIFFERENCES[name], words=(1,))
            if figure is None:
                yield from told
            else:
                yield from (block for block in told if not isinstance(block, Table))
                yield figure


def _first_table(lines: list[str]) -> TextTable | None:
    return next((block for block in blocks(lines) if isinstance(block, TextTable)), None)


def _forgetting(record: StudyRecord, cells: list[CellResult]) -> Iterator[Block]:
    ages = list(age_table(record.study, cells))
    behind = _first_table(ages)
    figure = ages_figure("ages", behind) if behind is not None else None
    if figure is None:
        yield from from_markdown(ages, AGES)
    else:
        yield figure
    each = tuple(_curves(record, cells))
    if each:
        yield Folded("Accuracy of each task over time, for every arm", each)


def _curves(record: StudyRecord, cells: list[CellResult]) -> Iterator[Block]:
    title = ""
    for block in blocks(list(curves(record.study, cells, "####"))):
        if isinstance(block, str):
            title = block.removeprefix("#### ")
        else:
            yield table(block, f"{title}: accuracy in %")


def _settings(record: StudyRecord, settings: list[str]) -> Iterator[Block]:
    """Yield the best setting of each arm, and the tables of every setting folded."""
    study, cells = record.study, record.results.cells
    differences = DIFFERENCES[AVERAGE_ACCURACY]
    best = "Best setting of every arm, by average accuracy in %"
    yield from from_markdown(best_settings(study, cells), best, words=(1,))
    yield Heading("Every setting")
    yield from from_markdown(setting_table(study, cells), "Average accuracy in %")
    for name in settings:
        own = record.cells(name)
        yield Folded(
            f"Setting {name}",
            (
                *from_markdown(arms_table(study, own), f"{ARMS}; setting {name}"),
                *from_markdown(significance(study, own), f"{differences}; setting {name}", (1,)),
                *from_markdown(age_table(study, own), f"{AGES}; setting {name}"),
                *from_markdown(cost_table(study, own), f"{COST}; setting {name}"),
            ),
        )


def _links(record: StudyRecord) -> tuple[tuple[str, str], ...]:
    """Return the pages of the runs that lie in the study's folder, but for those of cells that are
    no longer in the study."""
    cells = record.folder / "cells"
    runs = [page.parent.relative_to(cells) for page in sorted(cells.glob(f"**/{REPORT}"))]
    return tuple(
        (str("cells" / run / REPORT), str(run)) for run in runs if run.parts[0] not in record.gone
    )
