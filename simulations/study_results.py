"""``study.json``: what all finished cells of a study found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from server.folder import RunFolder
from server.results import Strict, read_results
from simulations.outcome import Outcome
from simulations.study_grid import Cell


class CellResult(Strict):
    """One finished cell; ``order`` and ``setting`` are empty where the study names none."""

    arm: str
    order: str
    setting: str
    seed: int
    bound: str
    outcome: Outcome


class StudyResults(Strict):
    """Schema of ``study.json``; ``wanted`` counts the cells of the whole grid."""

    schema_version: int = 1
    study: str
    description: str
    wanted: int
    cells: list[CellResult]


def finished(cell: Cell) -> bool:
    """Have all runs of a cell their results?"""
    return all(RunFolder(Path(run.run.out)).results.exists() for run in cell.runs.values())


def collect(cells: Sequence[Cell]) -> list[CellResult]:
    """Read what the finished cells found, in their order.

    Raises:
        UserError: a results file that is not valid.
    """
    return [_read(cell) for cell in cells if finished(cell)]


def _read(cell: Cell) -> CellResult:
    found = cell.outcome([read_results(Path(run.run.out)) for run in cell.runs.values()])
    return CellResult(
        arm=cell.arm,
        order=cell.order,
        setting=cell.setting,
        seed=cell.seed,
        bound=cell.bound,
        outcome=found,
    )
