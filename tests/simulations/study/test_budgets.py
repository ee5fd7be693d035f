"""Accuracy against the privacy budget, from cells that are made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.results import Privacy
from simulations.study.grid import Study, load_study
from simulations.study.results import CellResult
from simulations.study.tables import budget_table, meanings, sweep_text
from tests.simulations.study.test_tables import cell, rows

PRIVATE = Privacy(
    mechanism="record", unit="record", delta=1e-5, epsilon={"0": 0.9, "1": 1.0}, assumes="nobody"
)


def under(setting: str, seed: int, reached: float, spent: Privacy | None = None) -> CellResult:
    found = cell("deal", seed, [[0.8, 0.3], [reached, reached]], setting)
    return found.model_copy(
        update={"privacy": spent, "settings": {"": {"train.precision": "float32"}}}
    )


CELLS = [
    under("eps-1", 0, 0.4, PRIVATE),
    under("eps-1", 1, 0.5, PRIVATE.model_copy(update={"epsilon": {"0": 0.5}})),
    under("eps-inf", 0, 0.8),
    under("eps-inf", 1, 0.6),
]


@pytest.fixture
def study(tmp_path: Path) -> Study:
    path = tmp_path / "mine.toml"
    path.write_text('epsilons = "1,8,inf"\nseeds = [0, 1]\n[arms.deal]\n')
    return load_study(str(path))


def test_a_row_for_every_budget_that_has_run(study: Study) -> None:
    table = rows(budget_table(study, "deal", CELLS))
    assert list(table) == ["1", "inf (no privacy)"]
    # zero-shot is 0.2: 0.2 of 0.6, and 0.3 of 0.4
    assert table["1"][5] == "54.2 ± 264.7"
    assert table["1"][6] == "1"
    assert table["inf (no privacy)"][1] == "70.0 ± 127.1"
    assert table["inf (no privacy)"][5:] == ["100.0", "–"]


def test_an_epsilon_comes_with_its_delta_unit_extent_and_trust() -> None:
    (text,) = meanings(CELLS)
    assert text.startswith("Spent: epsilon at delta = 1e-05 per record, over all")
    seeded = PRIVATE.model_copy(update={"simulation_only": True})
    assert "simulation only" in meanings([under("eps-1", 0, 0.4, seeded)])[0]


def test_a_sweep_is_a_release_for_each_of_its_runs() -> None:
    text = sweep_text(CELLS)
    assert "the 2 private runs of this sweep would together spend at most epsilon = 1.5" in text
    assert "The 2 runs without privacy protect nothing" in text
    assert sweep_text(CELLS[2:]).startswith("No private run has finished")
