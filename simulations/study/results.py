"""``study.json``: what all finished cells of a study found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import Field

from deal_core.config.run_config import Value
from deal_core.errors import UserError
from server.folder import RunFolder
from server.results import Strict, read_results
from simulations.output.stored import read_stored
from simulations.run.run_folder import AUTO, PRECISION, differing, rows_of
from simulations.study.grid import (
    Cell,
    cell_name,
    default_settings,
    places,
    precise,
    resolved,
    settings_of,
)
from simulations.study.outcome import CountsKept, Outcome
from simulations.study.study_file import StudyFile

STUDY_JSON = "study.json"


class CellResult(Strict):
    """One finished cell; ``order`` and ``setting`` are empty where the study names none.

    Attributes:
        settings: of each of its runs, by the name of the part: what it set otherwise than the
            study's ``defaults``.
        rows: task to the SHA-256 of its rows; empty: an earlier version, which did not say.
    """

    arm: str
    order: str
    setting: str
    seed: int
    bound: str
    settings: dict[str, dict[str, Value]]
    outcome: Outcome
    rows: dict[str, str] = Field(default_factory=dict)

    @property
    def precision(self) -> Value:
        """In what the frozen model computed."""
        return next(iter(self.settings.values()), {}).get(PRECISION, AUTO)

    @property
    def name(self) -> str:
        """As of its :class:`~simulations.study.grid.Cell`."""
        return cell_name(self.arm, self.order, self.setting, self.seed)


class StudyResults(Strict):
    """Schema of ``study.json``.

    Attributes:
        wanted: cells of the whole grid.
        defaults: of every setting, by flat key.
        cells: what has finished; also of arms, orders, settings and seeds that are no longer in the
            study (see ``standing``).
        file: the study file, with the labels of its arms; None: written before schema version 3.
    """

    schema_version: int = 3
    study: str
    description: str
    wanted: int
    defaults: dict[str, Value]
    cells: list[CellResult]
    file: StudyFile | None = None

    @property
    def standing(self) -> list[CellResult]:
        """The cells that the study has now, without those that an earlier form of it had; all of
        them where the file does not say."""
        if self.file is None or not self.file.arms:
            return self.cells
        asked = {cell_name(*place) for place in places(self.file)}
        return [cell for cell in self.cells if cell.name in asked]


def kept(folder: Path, study: str, cells: Sequence[Cell]) -> dict[str, CellResult]:
    """Return the cells of a study's earlier ``study.json``, by their names: it is enough, the
    folders of their runs may be gone. Their settings are given by what differs from the defaults of
    today, whatever those were then.

    Raises:
        UserError: it cannot be read, is of another study, or a cell was found under other
            settings than now.
    """
    path = folder / STUDY_JSON
    if not path.exists():
        return {}
    cure = "remove it, or choose another --out"
    results = read_stored(StudyResults, path, "figures of a study", cure)
    if results.study != study:
        raise UserError(f"{path}: holds the study {results.study}; choose another --out")
    usual = {**default_settings(), **results.defaults}
    before = {cell.name: cell for cell in results.cells}
    for cell in cells:
        if cell.name in before:
            _check_same(path, cell, usual, before[cell.name])
    return {name: _of_today(cell, usual) for name, cell in before.items()}


def _of_today(cell: CellResult, usual: Mapping[str, Value]) -> CellResult:
    """Return a cell whose settings were written against other defaults, ``usual``."""
    settings = {part: unusual({**usual, **own}) for part, own in cell.settings.items()}
    return cell.model_copy(update={"settings": settings})


def unusual(settings: Mapping[str, Value]) -> dict[str, Value]:
    """Return what a run set otherwise than today's defaults. A key that there is no longer
    stays."""
    usual = default_settings()
    return {key: value for key, value in settings.items() if value != usual.get(key)}


def _check_same(path: Path, cell: Cell, usual: Mapping[str, Value], before: CellResult) -> None:
    """Check a cell's settings. Where precision is left to the machine, that of any machine stands;
    what a method leaves to the experiment is what that decides now.

    Raises:
        UserError: they are others now.
    """
    parts, then = sorted(cell.runs), sorted(before.settings)
    if parts != then:
        raise UserError(
            f"{path}: the cell {cell.name} is made of the runs {parts}, but was found with {then}; "
            "set the tasks or clients back, remove the cell from that file, or choose another --out"
        )
    for part, run in cell.runs.items():
        there = {**usual, **before.settings[part]}
        asked = settings_of(run)
        told = settings_of(resolved(run))
        for key in differing(asked, there):
            if told[key] == there[key]:  # what is auto now was said in so many words
                continue
            raise UserError(
                f"{path}: '{key}' is {json.dumps(asked[key])}, but the cell {cell.name} was run "
                f"with {json.dumps(there[key])}; set it back, remove the cell from that file, "
                "or choose another --out"
            )


def finished(cell: Cell) -> bool:
    """Have all runs of a cell their results?"""
    return all(RunFolder(Path(run.run.out)).results.exists() for run in cell.runs.values())


def collect(cells: Sequence[Cell], before: Mapping[str, CellResult]) -> list[CellResult]:
    """Return what the finished cells found, in their order; those of ``before`` stand as they are.
    Those without accuracies are left out: nothing can be compared with them.

    Raises:
        UserError: a results file that is not valid.
    """
    done = [cell for cell in cells if cell.name in before or finished(cell)]
    found = (before.get(cell.name) or _told(cell) for cell in done)
    return [each for each in found if each is not None]


def _told(cell: Cell) -> CellResult | None:
    try:
        return _read(cell)
    except CountsKept:
        return None


def _read(cell: Cell) -> CellResult:
    parts = {part: read_results(Path(run.run.out)) for part, run in cell.runs.items()}
    return CellResult(
        arm=cell.arm,
        order=cell.order,
        setting=cell.setting,
        seed=cell.seed,
        bound=cell.bound,
        settings={
            part: unusual(settings_of(precise(resolved(found.config))))
            for part, found in parts.items()
        },
        outcome=cell.outcome(list(parts.values())),
        rows=rows_of(Path(run.run.out) for run in cell.runs.values()),
    )
