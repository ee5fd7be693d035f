"""Pages and tables on a terminal: nothing wider than promised, nothing cut off."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from simulations.cli import app
from simulations.output import FIGURES, NARROW, Table, print_table
from simulations.study.command import print_summary
from simulations.study.grid import Study
from simulations.study.results import StudyResults
from tests.stored_results import RESULTS

WIDE = 200


def read_study(folder: Path) -> tuple[Study, StudyResults]:
    """A study and its results, of the cells that are in it."""
    text = (folder / "study.json").read_text(encoding="utf-8")
    results = StudyResults.model_validate_json(text)
    study = Study(results.study, folder, results.file)
    return study, results.model_copy(update={"cells": results.standing})


@pytest.mark.parametrize("name", ["medmcqa", "cl15-core", "tuning"])
def test_a_study_ends_with_a_table_of_eighty_columns(name: str) -> None:
    console = Console(file=io.StringIO(), width=WIDE)
    study, results = read_study(RESULTS / name)
    print_summary(console, study, results)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= NARROW
    for arm in {cell.arm for cell in results.cells}:
        assert any(study.label(arm)[:6] in line for line in lines)


def test_names_in_a_table_are_no_markup() -> None:
    console = Console(file=io.StringIO(), width=WIDE)
    print_table(console, Table("of [blue]", ("setting", "[red]run"), (("[bold]key", "1"),)))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(name in said for name in ("[red]run", "[bold]key", "of [blue]"))


@pytest.mark.parametrize(("words", "own"), [("study tuning", "study.json"), ("audit private", "")])
def test_figures_of_another_kind_are_left_alone(words: str, own: str, tmp_path: Path) -> None:
    file = "results.json" if own else "study.json"
    (tmp_path / file).write_text("{}")
    result = CliRunner().invoke(app, [*words.split(), "--out", str(tmp_path)])
    assert str(result.exception) == f"{tmp_path}: holds {FIGURES[file]}; name another --out"
    assert [each.name for each in tmp_path.iterdir()] == [file]
