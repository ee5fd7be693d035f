"""``deal report`` and ``deal compare``: which page a folder gets, what stands side by side, and
what happens where there is nothing."""

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from deal_core.errors import UserError
from server.results import read_results
from simulations.report.commands import report_after
from tests.simulations.report.html_page import HtmlPage
from tests.simulations.report.test_ledger import deal as called
from tests.stored_results import RESULTS


@pytest.mark.usefixtures("undrawn")
def test_each_folder_gets_the_page_of_what_lies_in_it(examples, tmp_path):
    kinds = {"Run": examples / "plain", "Audit": RESULTS / "audit-private"}
    folders = [Path(shutil.copytree(path, tmp_path / kind)) for kind, path in kinds.items()]
    (folders[0] / "report.html").write_text("old")
    said = called("report", folders[0] / "results.json", folders[1])
    for kind, folder in zip(kinds, folders, strict=True):
        assert f"report in {folder / 'report.html'}" in said
        title = HtmlPage((folder / "report.html").read_text(encoding="utf-8")).text
        assert f" – {kind} – deal" in title


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("", "", "no run, study or audit here"),
        ("metrics.jsonl", "", "no such file"),
        ("experiment.toml", "", "has not begun"),
        ("results.json", "{", "not a valid results file"),
        ("study.json", "{", "no figures of a study"),
        ("audit.json", "{", "no audit"),
    ],
)
def test_what_cannot_be_reported_is_one_line(file, content, message, tmp_path):
    if file:
        (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        called("report", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_report_that_fails_costs_nothing_of_what_it_is_about(tmp_path, monkeypatch):
    console = Console(record=True, width=200)

    def fail(folder):
        raise ZeroDivisionError("of the drawing")

    monkeypatch.setattr("simulations.report.commands.write_report", fail)
    report_after(tmp_path, console)
    assert "no report: ZeroDivisionError: of the drawing" in console.export_text()


@pytest.fixture
def runs(examples, tmp_path):
    return [Path(shutil.copytree(examples / n, tmp_path / n)) for n in ("plain", "private")]


def test_runs_side_by_side_have_their_figures_and_what_an_epsilon_means(runs):
    said = called("compare", *runs)
    for run in runs:
        found = read_results(run)
        assert found.class_incremental is not None
        (line,) = [line.split() for line in said.splitlines() if line.split()[:1] == [run.name]]
        averages = (found.average_accuracy or 0.0, found.class_incremental.average_accuracy)
        assert line[1:3] == [f"{100 * average:.1f}" for average in averages]
        assert line[4] == f"{100 * (found.forgetting or 0.0):.1f}"
    (meaning,) = [line for line in said.splitlines() if line.startswith("[1] epsilon at delta = ")]
    for part in ("per record", "over all rounds", read_results(runs[1]).privacy.assumes):
        assert part in meaning
    assert max(len(line) for line in said.splitlines() if not line.startswith("[1] ")) <= 80
    assert "privacy.mechanism" in said
    assert "run.out" not in said


def test_what_makes_runs_hard_to_compare_is_said(runs):
    data = json.loads((runs[0] / "results.json").read_text())
    one, *others = data["tasks"]
    data["tasks"] = [*others, one]
    (runs[0] / "results.json").write_text(json.dumps(data))
    for run, rows in zip(runs, ("1", "2"), strict=True):
        noted = dict.fromkeys((one, *others), rows) | {others[0]: "same"}
        (run / "rows.json").write_text(json.dumps(noted))
    said = called("compare", *runs)
    assert "same tasks in different orders" in said
    assert f"Task '{one}' has other rows in one run than in another, by other files" in said
    assert said.count("other rows") == len(others)


def test_runs_of_one_name_are_told_apart_and_bad_input_is_one_line(runs, tmp_path):
    twins = [shutil.copytree(runs[0], tmp_path / where / "run") for where in ("a", "b")]
    said = called("compare", *twins)
    assert "a/run " in said
    assert "b/run " in said
    assert "Settings that differ" not in said
    for folders, message in (
        ([runs[0]], "name two runs"),
        ([runs[0], runs[0]], "each once"),
        ([runs[0], tmp_path], "the run has not finished"),
    ):
        with pytest.raises(UserError, match=message):
            called("compare", *folders)
