"""A study as its folder says it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from simulations.output.stored import read_stored
from simulations.study.results import STUDY_JSON, CellResult, StudyResults
from simulations.study.study_file import Arm, Study, StudyFile


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
    """Return a study file that has all arms and settings of the cells, named as they are."""
    return StudyFile(
        description=results.description,
        arms={cell.arm: Arm(bound=cell.bound) for cell in results.cells},
        settings={cell.setting: {} for cell in results.cells if cell.setting},
    )
