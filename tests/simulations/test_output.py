"""Pages and tables on a terminal: nothing wider than promised, nothing cut off."""

import io

import pytest
from rich.console import Console
from typer.testing import CliRunner

from simulations.cli import app
from simulations.output import FIGURES, Table, print_table

WIDE = 200


def test_names_in_a_table_are_no_markup():
    console = Console(file=io.StringIO(), width=WIDE)
    print_table(console, Table("of [blue]", ("setting", "[red]run"), (("[bold]key", "1"),)))
    said = console.file.getvalue()
    assert all(name in said for name in ("[red]run", "[bold]key", "of [blue]"))


@pytest.mark.parametrize(("words", "own"), [("study tuning", "study.json"), ("audit private", "")])
def test_figures_of_another_kind_are_left_alone(words, own, tmp_path):
    file = "results.json" if own else "study.json"
    (tmp_path / file).write_text("{}")
    result = CliRunner().invoke(app, [*words.split(), "--out", str(tmp_path)])
    assert str(result.exception) == f"{tmp_path}: holds {FIGURES[file]}; name another --out"
    assert [each.name for each in tmp_path.iterdir()] == [file]
