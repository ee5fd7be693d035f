"""The rows of a study's cells: cells that are compared were found on the same ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from deal_core.config.run_config import Value
from deal_core.errors import UserError
from simulations.study.results import CellResult

ROWS_DO_NOT_DEPEND_ON = ("data.path", "data.tasks", "data.partition.")
"""Settings under which a task has the same rows: where they lie, in which turn, and whose."""


def require_same_rows(cells: Iterable[CellResult]) -> None:
    """Check that a task had the same rows in all cells of a seed that ask for the same of its data.

    Raises:
        UserError: a task and two cells in which it had others.
    """
    seen: dict[tuple[object, ...], tuple[str, str]] = {}
    for cell in cells:
        asked = _asked_of_data(next(iter(cell.settings.values()), {}))
        for task, rows in cell.rows.items():
            known, name = seen.setdefault((cell.seed, asked, task), (rows, cell.name))
            if known != rows:
                raise UserError(
                    f"the rows of task '{task}' are others in the cell {cell.name} than in {name}, "
                    "so their accuracies cannot be compared; put the data back and remove the "
                    f"folder of {cell.name}, or choose another --out"
                )


def _asked_of_data(settings: Mapping[str, Value]) -> tuple[tuple[str, str], ...]:
    return tuple(
        (key, str(value))
        for key, value in sorted(settings.items())
        if key.startswith("data.") and not key.startswith(ROWS_DO_NOT_DEPEND_ON)
    )
