"""Runs side by side: the terminal and the page say what the files say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from deal_core.errors import UserError
from server.results import read_results
from tests.simulations.report.html_page import EXAMPLES, HtmlPage
from tests.simulations.report.test_command import called


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [Path(shutil.copytree(EXAMPLES / n, tmp_path / n)) for n in ("plain", "private")]


def test_terminal_and_page_have_the_figures_and_what_an_epsilon_means(
    runs: list[Path], tmp_path: Path
) -> None:
    said = called("compare", *runs, "--out", tmp_path / "out")
    shown = HtmlPage((tmp_path / "out" / "compare.html").read_text(encoding="utf-8"))
    names, *rows = shown.table("Measures of every run")
    for row, run in zip(rows, runs, strict=True):
        found, figures = read_results(run), dict(zip(names, row, strict=True))
        assert figures["Task-IL accuracy"] == f"{100 * (found.average_accuracy or 0.0):.1f}"
        assert figures["forgetting"] == f"{100 * (found.forgetting or 0.0):.1f}"
        (line,) = [line.split() for line in said.splitlines() if line.split()[:1] == [run.name]]
        assert line[1:3] == [figures["Task-IL accuracy"], figures["Class-IL accuracy"]]
    (meaning,) = [line for line in said.splitlines() if line.startswith("[1] ")]
    for part in (
        "delta = ",
        "per record",
        "over all rounds",
        read_results(runs[1]).privacy.assumes,
    ):
        assert part in meaning
        assert part in shown.text
    assert max(map(len, said.partition("[1] e")[0].splitlines())) <= 80
    settings = shown.table("Settings in which the runs differ")
    assert ["privacy.mechanism", "none", "record"] in settings
    assert "privacy.mechanism" in said
    assert not any(row[0].startswith(("run.", "data.path")) for row in settings)


def test_what_makes_runs_hard_to_compare_is_said(runs: list[Path], tmp_path: Path) -> None:
    data = json.loads((runs[0] / "results.json").read_text())
    data["tasks"] = data["tasks"][::-1]
    (runs[0] / "results.json").write_text(json.dumps(data))
    assert "same tasks in different orders" in called("compare", *runs, "--out", tmp_path / "out")


def test_runs_of_one_name_get_as_much_of_their_place_as_tells_them_apart(tmp_path: Path) -> None:
    runs = [shutil.copytree(EXAMPLES / "plain", tmp_path / where / "run") for where in ("a", "b")]
    said = called("compare", *runs, "--out", tmp_path / "out")
    assert "a/run " in said
    assert "b/run " in said
    assert "settings that differ" not in said


def test_bad_input_is_one_line(runs: list[Path], tmp_path: Path) -> None:
    for folders, message in (
        ([runs[0]], "name two runs"),
        ([runs[0], runs[0]], "names a run twice"),
        ([runs[0], tmp_path], "the run has not finished"),
    ):
        with pytest.raises(UserError, match=message):
            called("compare", *folders, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def noted(run: Path, **rows: str) -> None:
    tasks = {name: {"train": 1, "test": 1, "sha256": value} for name, value in rows.items()}
    (run / "data.json").write_text(json.dumps({"tasks": tasks, "public": "", "form": 1}))


def test_runs_on_other_rows_are_told_apart(runs: list[Path], tmp_path: Path) -> None:
    """By what each has noted."""
    one, *others = read_results(runs[0]).tasks
    for run, rows in zip(runs, ("1", "2"), strict=True):
        noted(run, **{one: rows, **dict.fromkeys(others, "same")})
    said = called("compare", *runs, "--out", tmp_path / "out")
    assert f"Task '{one}' has other rows in one run than in another." in said
    assert said.count("other rows") == 1
