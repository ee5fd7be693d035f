"""Runs side by side: the terminal, the page and the CSV say what the files say."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from deal_core.errors import UserError
from server.results import read_results
from simulations.report.command import report_comparison
from tests.simulations.report.html_page import HtmlPage

EXAMPLES = Path(__file__).parent / "examples"


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [Path(shutil.copytree(EXAMPLES / n, tmp_path / n)) for n in ("plain", "private")]


def compared(runs: list[Path], out: Path) -> str:
    console = Console(file=io.StringIO(), width=160)
    report_comparison([str(run) for run in runs], str(out), console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_terminal_shows_a_narrow_table_and_what_an_epsilon_means(
    runs: list[Path], tmp_path: Path
) -> None:
    said = compared(runs, tmp_path / "out")
    plain, private = (read_results(run) for run in runs)
    rows = [line.split() for line in said.splitlines()]
    (first,) = [row for row in rows if row[:1] == ["plain"]]
    (second,) = [row for row in rows if row[:1] == ["private"]]
    assert plain.average_accuracy is not None
    assert first[1] == f"{100 * plain.average_accuracy:.1f}"
    assert first[6] == "–"
    assert second[6:8] == [f"{max(private.privacy.epsilon.values()):.3g}", "[1]"]
    (meaning,) = [line for line in said.splitlines() if line.startswith("[1] ")]
    for part in ("delta = ", "per record", "over all rounds", private.privacy.assumes):
        assert part in meaning
    tables = [line for line in said.splitlines() if not line.startswith(("[1]", "page in"))]
    assert max(map(len, tables)) <= 80
    assert "privacy.mechanism" in said
    assert "run.out" not in said


def test_the_csv_has_exact_values(runs: list[Path], tmp_path: Path) -> None:
    compared(runs, tmp_path / "out")
    text = (tmp_path / "out" / "compare.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(io.StringIO(text)))
    for row, run in zip(rows, runs, strict=True):
        found = read_results(run)
        assert row["run"] == run.name
        for name in ("average_accuracy", "backward_transfer", "forward_transfer", "forgetting"):
            assert float(row[name]) == getattr(found, name)
        assert float(row["seconds"]) == found.seconds["total"]
        assert float(row["bytes_up_per_client"]) == sum(found.wire.bytes_up)
        assert row["privacy.mechanism"] == found.privacy.mechanism
    plain, private = rows
    assert (plain["epsilon"], plain["delta"], plain["unit"], plain["composed_over"]) == ("",) * 4
    told = read_results(runs[1]).privacy
    assert float(private["epsilon"]) == max(told.epsilon.values())
    assert float(private["delta"]) == told.delta
    over = "all rounds and tasks, and whatever the client's ledger held before"
    assert (private["unit"], private["composed_over"], private["void"]) == ("record", over, "false")
    assert private["assumes"] == told.assumes
    assert json.loads(private["simulation_only"]) is True


def test_the_page_has_the_same_figures(runs: list[Path], tmp_path: Path) -> None:
    compared(runs, tmp_path / "out")
    shown = HtmlPage((tmp_path / "out" / "compare.html").read_text(encoding="utf-8"))
    table = shown.table("Measures of every run")
    for row, run in zip(table[1:], runs, strict=True):
        found = read_results(run)
        values = (found.average_accuracy, found.forgetting)
        places = (table[0].index("average accuracy"), table[0].index("forgetting"))
        assert [row[i] for i in places] == [f"{100 * (v or 0.0):.1f}" for v in values]
    assert "epsilon of private" in shown.text
    settings = shown.table("Settings in which the runs differ")
    assert ["privacy.mechanism", "none", "record"] in settings
    assert not any(row[0].startswith(("run.", "data.path")) for row in settings)


def test_what_makes_runs_hard_to_compare_is_said(runs: list[Path], tmp_path: Path) -> None:
    data = json.loads((runs[0] / "results.json").read_text())
    data["tasks"] = data["tasks"][::-1]
    (runs[0] / "results.json").write_text(json.dumps(data))
    assert "same tasks in different orders" in compared(runs, tmp_path / "out")


def test_runs_of_one_name_get_as_much_of_their_place_as_tells_them_apart(tmp_path: Path) -> None:
    runs = [
        Path(shutil.copytree(EXAMPLES / "plain", tmp_path / where / "run")) for where in ("a", "b")
    ]
    said = compared(runs, tmp_path / "out")
    assert "a/run " in said
    assert "b/run " in said
    assert "Settings that differ" not in said


def test_bad_input_is_one_line(runs: list[Path], tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    for folders, message in (
        ([runs[0]], "name two runs"),
        ([runs[0], runs[0]], "names a run twice"),
        ([runs[0], tmp_path], "the run has not finished"),
    ):
        with pytest.raises(UserError, match=message):
            report_comparison([str(folder) for folder in folders], str(tmp_path / "out"), console)
    assert not (tmp_path / "out").exists()


def noted(run: Path, **rows: str) -> None:
    tasks = {name: {"train": 1, "test": 1, "sha256": value} for name, value in rows.items()}
    (run / "data.json").write_text(json.dumps({"tasks": tasks, "public": "", "form": 1}))


def test_runs_on_other_rows_are_told_apart(runs: list[Path], tmp_path: Path) -> None:
    """By what each has noted; the numbers of test rows may be known of one run alone."""
    one, *others = read_results(runs[0]).tasks
    for run, rows in zip(runs, ("1", "2"), strict=True):
        noted(run, **{one: rows, **dict.fromkeys(others, "same")})
    said = compared(runs, tmp_path / "out")
    assert f"Task '{one}' has other rows in one run than in another." in said
    assert said.count("other rows") == 1
    for run in runs:
        noted(run, **dict.fromkeys([one, *others], "same"))
    assert "other rows" not in compared(runs, tmp_path / "again")


def test_without_notes_the_numbers_of_test_rows_are_compared(
    runs: list[Path], tmp_path: Path
) -> None:
    results = json.loads((runs[1] / "results.json").read_text())
    for client in results["per_client"].values():
        client["test_examples"] = [2 * n for n in client["test_examples"]]
    (runs[1] / "results.json").write_text(json.dumps(results))
    for run in runs:
        (run / "data.json").unlink(missing_ok=True)
    assert "was tested on other numbers of rows." in compared(runs, tmp_path / "out")
