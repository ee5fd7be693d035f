"""A folder of figures is not given to another command's."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from deal_core.errors import UserError
from simulations.cli import app
from simulations.output.console import FIGURES


@pytest.mark.parametrize(
    ("words", "own"),
    [
        (("study", "tuning"), "study.json"),
        (("audit", "private"), "audit.json"),
    ],
)
def test_figures_of_another_kind_are_left_alone(
    words: tuple[str, ...], own: str, tmp_path: Path
) -> None:
    for file, kind in FIGURES.items():
        if file == own:
            continue
        out = tmp_path / file
        out.mkdir()
        (out / file).write_text("{}")
        result = CliRunner().invoke(app, [*words, "--out", str(out)])
        assert isinstance(result.exception, UserError)
        assert str(result.exception) == f"{out}: holds {kind}; name another --out"
        assert [each.name for each in out.iterdir()] == [file]
