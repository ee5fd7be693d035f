"""A study as its folder says it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from simulations.output.stored import read_stored
from simulations.run.shipped import shipped_studies
from simulations.study.results import STUDY_JSON, CellResult, StudyResults
from simulations.study.study_file import Arm, Study, StudyFile, load_study


@dataclass(frozen=True)
class StudyRecord:
    """A study and what it has found.

    Attributes:
        results: of the cells that are in the study.
        gone: names of those that no longer are.
    """

    folder: Path
    study: Study
    results: StudyResults
    gone: frozenset[str] = frozenset()

    @property
    def settings(self) -> list[str]:
        """Names of the settings; one empty name where there are none."""
        return list(self.study.file.settings) or [""]

    def cells(self, setting: str) -> list[CellResult]:
        """Return the finished cells under a setting."""
        return [cell for cell in self.results.cells if cell.setting == setting]


def read_study(folder: Path) -> StudyRecord:
    """Return the study in a folder.

    Raises:
        UserError: its file cannot be read.
    """
    path = folder / STUDY_JSON
    results = read_stored(StudyResults, path, "figures of a study")
    standing = results.standing
    gone = {cell.name for cell in results.cells} - {cell.name for cell in standing}
    file = results.file if results.file and results.file.arms else _file(results)
    results = results.model_copy(update={"cells": standing})
    return StudyRecord(folder, Study(results.study, path, file), results, frozenset(gone))


def _file(results: StudyResults) -> StudyFile:
    """Return a study file that has all arms of the cells: labels are those of the shipped study of
    that name, or the names themselves."""
    shipped = StudyFile(description=results.description)
    if results.study in shipped_studies():
        shipped = load_study(results.study).file
    arms = dict(shipped.arms)
    for cell in results.cells:
        arms.setdefault(cell.arm, Arm(bound=cell.bound))
    settings = dict(shipped.settings)
    for cell in results.cells:
        if cell.setting:
            settings.setdefault(cell.setting, {})
    return shipped.model_copy(update={"arms": arms, "settings": settings})
