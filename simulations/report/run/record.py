"""What the folder of a run says: settings, results, labels, bounds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from deal_core import metrics
from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from server.folder import RunFolder, held, read_events
from server.results import Results, read_results
from simulations.report.page.blocks import Cell, Table, whole
from simulations.report.run.label_counts import LabelCounts, read_label_counts
from simulations.report.run.log import RunLog, read_log
from simulations.report.run.spectrum import Spectrum, read_spectrum
from simulations.run.run_folder import RECORD, recorded
from simulations.study.bounds import BOUNDS
from simulations.study.results import STUDY_JSON, CellResult, StudyResults


def labels(run: RunRecord) -> Table | None:
    """Return a row for each task; None: the results are from before labels were in them."""
    found = run.results.labels if run.results else {}
    if not found:
        return None
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (f"{j} {task}", whole(len(found.get(task, []))), ", ".join(found.get(task, [])) or "texts")
        for j, task in enumerate(run.tasks, start=1)
    )
    return Table("Labels of each task", ("task", "labels", "names"), rows, words=(2,))


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


State = Literal["finished", "running", "stopped"]


@dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
        results: None: it has not finished.
        bounds: of the study that the run is a cell of.
        spectrum: of the learnt adapter; None: there is none yet.
        label_counts: None: nobody has counted.
    """

    folder: Path
    experiment: Experiment
    log: RunLog
    results: Results | None
    state: State
    bounds: tuple[BoundFigure, ...] = ()
    spectrum: Spectrum | None = None
    label_counts: LabelCounts | None = None

    @property
    def tasks(self) -> list[str]:
        """In the stream's order."""
        return self.results.tasks if self.results else self.log.tasks

    @property
    def stages(self) -> list[list[str]]:
        """Tasks worked on in each stage, those to come included."""
        if self.results:
            return [list(stage.work) for stage in self.results.stages]
        return [tasks for tasks, _ in self.log.stages]

    @property
    def spans(self) -> tuple[list[int], list[int]]:
        """Stage in which each task is begun, and in which it is learnt."""
        return metrics.spans(self.tasks, self.stages)

    @property
    def matrix(self) -> list[list[float | None]]:
        """Accuracy after each stage that was evaluated, on each task; None: not known."""
        if self.results:
            return [list(row) for row in self.results.accuracy_matrix]
        return _rows(self.log.evaluations, self.tasks)

    @property
    def among_all(self) -> list[list[float | None]]:
        """The same among all labels seen so far; empty: not known."""
        if self.results:
            found = self.results.class_incremental
            return [] if found is None else [list(row) for row in found.accuracy_matrix]
        rows = _rows(self.log.among_all, self.tasks)
        return rows if any(value is not None for row in rows for value in row) else []

    @property
    def zero_shot(self) -> list[float | None]:
        """Accuracy before any training, on each task; None: not known."""
        found = self.results.zero_shot if self.results else self.log.evaluations.get(-1, {})
        return [found.get(task) for task in self.tasks]

    @property
    def averages(self) -> dict[str, float | None]:
        """Client to the mean of its accuracies at the end; empty before."""
        own = self.results.per_client if self.results else {}
        return {self.log.name(name): found.average_accuracy for name, found in own.items()}

    def is_text(self, task: str) -> bool:
        """Whether answers are texts."""
        return task in self.experiment.data.generation


def _rows(evaluations: dict[int, dict[str, float]], tasks: list[str]) -> list[list[float | None]]:
    """Return a row for every stage up to the last one evaluated."""
    last = max(evaluations, default=-1)
    return [[evaluations.get(i, {}).get(task) for task in tasks] for i in range(last + 1)]


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, begun at least."""
    run = RunFolder(folder)
    return any(path.is_file() for path in (run.results, run.metrics, folder / RECORD))


def read_run(folder: Path) -> RunRecord:
    """Return what the folder of a run says.

    Raises:
        UserError: its files cannot be read, or it has not begun.
    """
    run = RunFolder(folder)
    results = read_results(folder) if run.results.is_file() else None
    experiment = results.config if results else recorded(folder)
    try:
        log = read_log(read_events(run.metrics))
    except (ValueError, KeyError, TypeError, OSError, ValidationError) as error:
        raise UserError(f"{run.metrics}: cannot be read ({error})") from None
    if results is None and not log.starts:
        raise UserError(f"{folder}: the run has not begun, there is nothing to report")
    return RunRecord(
        folder=folder,
        experiment=experiment,
        log=log,
        results=results,
        state=_state(run, results),
        bounds=bounds_of(folder, experiment),
        spectrum=read_spectrum(run),
        label_counts=read_label_counts(folder) if results else None,
    )


def _state(run: RunFolder, results: Results | None) -> State:
    if results is not None:
        return "finished"
    return "running" if held(run.writing) else "stopped"
