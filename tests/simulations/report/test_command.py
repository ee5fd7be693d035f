"""``deal report``: which page a folder gets, and what happens where there is none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from deal_core.errors import UserError
from simulations.cli import app
from simulations.report.commands import report_after
from tests.simulations.report.html_page import EXAMPLES, HtmlPage
from tests.stored_results import RESULTS


def called(*words: object) -> str:
    """The output of ``deal WORDS``; a user's error is raised."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_each_folder_gets_the_page_of_what_lies_in_it(tmp_path: Path) -> None:
    kinds = {
        "Run": EXAMPLES / "plain",
        "Study": RESULTS / "memory",
        "Audit": RESULTS / "audit-private",
    }
    folders = [Path(shutil.copytree(path, tmp_path / kind)) for kind, path in kinds.items()]
    (folders[0] / "report.html").write_text("old")
    said = called("report", folders[0] / "results.json", *folders[1:])
    for kind, folder in zip(kinds, folders, strict=True):
        assert f"report in {folder / 'report.html'}" in said
        title = HtmlPage((folder / "report.html").read_text(encoding="utf-8")).text
        assert f" – {kind} – deal" in title


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("", "", "no run, study or audit here"),
        ("metrics.jsonl", "", "no such file"),
        ("experiment.toml", (EXAMPLES / "plain/experiment.toml").read_text(), "has not begun"),
        ("results.json", "{", "not a valid results file"),
        ("study.json", "{", "no figures of a study"),
        ("audit.json", "{", "no audit"),
    ],
)
def test_what_cannot_be_reported_is_one_line(
    file: str, content: str, message: str, tmp_path: Path
) -> None:
    if file:
        (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        called("report", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_report_that_fails_costs_nothing_of_what_it_is_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(record=True, width=200)

    def fail(folder: Path) -> Path:
        raise ZeroDivisionError("of the drawing")

    monkeypatch.setattr("simulations.report.commands.write_report", fail)
    report_after(tmp_path, console)
    assert "no report: ZeroDivisionError: of the drawing" in console.export_text()
