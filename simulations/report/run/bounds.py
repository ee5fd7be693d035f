"""Bounds that are known of a run: it is the cell of a study that has measured them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deal_core.config.experiment import Experiment
from simulations.study.bounds import BOUNDS
from simulations.study.results import STUDY_JSON, CellResult, StudyResults

CELLS = "cells"
"""Folder of the runs in that of a study."""


@dataclass(frozen=True)
class BoundFigure:
    """Accuracies of a bound under the run's seed, order and setting; None: not known."""

    name: str
    average_accuracy: float
    among_all: float | None


def bounds_of(folder: Path, experiment: Experiment) -> tuple[BoundFigure, ...]:
    """Return the bounds of the run's study, of its seed, order and setting.

    Args:
        folder: of the run.
        experiment: that it runs.

    Returns:
        None of them where the run is no cell of a study, or that cannot be read: a page must not
        fail by what lies around a run.
    """
    if folder.parent.name != CELLS:
        return ()
    path = folder.parents[1] / STUDY_JSON
    try:
        study = StudyResults.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ()
    place = folder.name.split(".")[1:-1]
    return tuple(
        BoundFigure(cell.arm, cell.outcome.average_accuracy, cell.outcome.among_all_labels)
        for cell in study.standing
        if cell.bound and cell.seed == experiment.run.seed and _comparable(cell, place)
    )


def _comparable(cell: CellResult, place: list[str]) -> bool:
    """Return whether a bound is of the order and the setting in a run's name; of any order, where
    that changes nothing."""
    order, settings = (place[:1], place[1:]) if cell.order else ([], place)
    if settings != [cell.setting] * bool(cell.setting):
        return False
    return order == [cell.order] * bool(cell.order) or not BOUNDS[cell.bound].ordered
