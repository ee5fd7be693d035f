"""``study.md``: the page of a study, made of its tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from simulations.study.budgets import budget_section
from simulations.study.results import CellResult, StudyResults
from simulations.study.study_file import Study
from simulations.study.tables import (
    ALL_LABELS,
    ALL_LABELS_EXPLAINED,
    EXPLANATION,
    age_table,
    all_labels_table,
    arms_table,
    best_settings,
    cost_table,
    measures_of,
    precisions,
    setting_table,
    significance,
)


def markdown(study: Study, results: StudyResults) -> str:
    """Return the whole page."""
    more = ALL_LABELS_EXPLAINED if ALL_LABELS in measures_of(results.cells) else ""
    lines = [f"# Study {study.name}", "", study.file.description, ""]
    lines += [f"{len(results.cells)} of {results.wanted} cells done. {EXPLANATION}{more}", ""]
    lines += [*precisions(results), ""]
    settings = list(study.file.settings)
    if study.file.epsilons:
        lines += list(budget_section(study, results.cells))
    elif len(settings) > 1:
        lines += list(_settings(study, results.cells))
    for setting in settings or [""]:
        cells = [cell for cell in results.cells if cell.setting == setting]
        if cells:
            lines += list(_section(study, setting, cells))
    return "\n".join(lines).rstrip() + "\n"


def _section(study: Study, setting: str, cells: Sequence[CellResult]) -> Iterator[str]:
    if setting:
        yield from (f"## Setting {setting}", "")
    level = "###" if setting else "##"
    yield from (f"{level} Arms", "", *arms_table(study, cells), "")
    yield from (f"{level} Differences in average accuracy", "", *significance(study, cells), "")
    if ALL_LABELS in measures_of(cells):
        yield from (f"{level} Among all labels", "", *all_labels_table(study, cells), "")
        among_all = significance(study, cells, ALL_LABELS)
        yield from (f"{level} Differences among all labels", "", *among_all, "")
    yield from (f"{level} Forgetting", "", *age_table(study, cells), "")
    yield from (f"{level} Cost", "", *cost_table(study, cells), "")


def _settings(study: Study, cells: Sequence[CellResult]) -> Iterator[str]:
    """Average accuracy of every arm under every setting, and the best setting of each."""
    yield from ("## Average accuracy by setting", "", *setting_table(study, cells), "")
    yield from ("## Best setting of every arm, by average accuracy", "")
    yield from (*best_settings(study, cells), "")
