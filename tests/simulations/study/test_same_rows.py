"""Cells that are compared were found on the same rows, wherever these lie."""

from __future__ import annotations

import json

import pytest

from deal_core.errors import UserError
from simulations.study.results import CellResult, require_same_rows
from tests.stored_results import RESULTS

STORED = RESULTS / "memory" / "study.json"


@pytest.fixture
def cell() -> CellResult:
    cells = json.loads(STORED.read_text(encoding="utf-8"))["cells"]
    return CellResult.model_validate(cells[0])


def beside(cell: CellResult, rows: str, seed: int | None = None, **settings: object) -> CellResult:
    """Another arm's cell, with rows of its own."""
    there = {part: {**own, **settings} for part, own in cell.settings.items()}
    seed = cell.seed if seed is None else seed
    changed = {"arm": "other", "rows": {"heart": rows}, "settings": there, "seed": seed}
    return cell.model_copy(update=changed)


def test_other_rows_of_a_task_are_refused_with_both_cells(cell):
    first = cell.model_copy(update={"rows": {"heart": "1"}})
    with pytest.raises(UserError, match="rows of task 'heart' are others in the cell other"):
        require_same_rows([first, beside(cell, "2")])


@pytest.mark.parametrize("key", ["data.path", "data.tasks", "data.partition.kind"])
def test_where_rows_lie_and_whose_they_are_excuses_nothing(cell, key):
    first = cell.model_copy(update={"rows": {"heart": "1"}})
    with pytest.raises(UserError, match="cannot be compared"):
        require_same_rows([first, beside(cell, "2", **{key: "elsewhere"})])


def test_other_seeds_other_budgets_and_earlier_versions_have_rows_of_their_own(cell):
    first = cell.model_copy(update={"rows": {"heart": "1"}})
    require_same_rows(
        [
            first,
            beside(cell, "1"),
            beside(cell, "2", seed=cell.seed + 1),
            beside(cell, "2", **{"data.max_train": 7}),
            cell.model_copy(update={"rows": {}}),
        ]
    )
