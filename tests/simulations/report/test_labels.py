"""Measures of each label, against counts by hand."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from deal_core.config.experiment import RunConfig
from deal_core.errors import UserError
from server.folder import RunFolder
from server.results import read_results
from simulations.report.commands import write_report
from simulations.report.labels import (
    FILE,
    LabelCounts,
    TaskCounts,
    count_labels,
)
from simulations.run.run_folder import write_row_hashes
from tests.simulations.report.html_page import EXAMPLES, HtmlPage

COUNTS = TaskCounts(labels=["cat", "dog", "bird"], counts=[[3, 1, 0], [2, 4, 0], [0, 0, 0]])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EXAMPLES / "plain", tmp_path / "a-run"))


def test_precision_recall_and_f1_are_those_of_the_counts() -> None:
    """cat: 3 of 4 texts, 3 of 5 answers; dog: 4 of 6, 4 of 5; no bird, and none seen."""
    by_hand = [[3 / 5, 3 / 4, 2 / 3], [4 / 5, 4 / 6, 8 / 11], [np.nan, np.nan, 0.0]]
    np.testing.assert_allclose(COUNTS.scores(), by_hand)
    assert COUNTS.macro_f1 == pytest.approx((2 / 3 + 8 / 11) / 2)


def shown(run: Path, **tasks: TaskCounts) -> HtmlPage:
    (run / FILE).write_text(LabelCounts(tasks=tasks).model_dump_json())
    return HtmlPage(write_report(run).read_text(encoding="utf-8"))


def test_the_page_has_measures_and_confusions(run: Path) -> None:
    page = shown(run, surgery=COUNTS)
    assert page.table("Each label of surgery")[1:] == [
        ["cat", "4", "60.0", "75.0", "66.7"],
        ["dog", "6", "80.0", "66.7", "72.7"],
        ["bird", "0", "–", "–", "0.0"],
    ]
    assert "3 labels, macro F1 69.7." in page.text
    matrix = page.table("surgery: texts by true label")
    assert matrix == [
        ["true label", "cat", "dog", "bird"],
        ["cat", "3", "1", "0"],
        ["dog", "2", "4", "0"],
        ["bird", "0", "0", "0"],
    ]


def test_texts_have_their_measures_and_many_labels_no_matrix(run: Path) -> None:
    names = [f"label {number}" for number in range(40)]
    counts = [[int(i == j) for j in range(40)] for i in range(40)]
    scores = {"exact-match": 0.125, "rouge-1": 0.5, "rouge-l": 0.375}
    many = TaskCounts(labels=names, counts=counts)
    found = LabelCounts(tasks={"laboratory": many}, texts={"surgery": scores})
    (run / FILE).write_text(found.model_dump_json())
    page = HtmlPage(write_report(run).read_text(encoding="utf-8"))
    written = page.table("Texts written for surgery, in %")
    assert written[1:] == [["surgery", "37.5", "50.0", "12.5"]]
    assert "40 labels, macro F1 100.0" in page.text
    assert len(page.table("Each label of laboratory")) == 41
    assert "texts by true label" not in page.text


def test_without_counts_the_page_says_how_to_get_them(run: Path) -> None:
    assert "deal report RUN --labels" in HtmlPage(write_report(run).read_text("utf-8")).text
    (run / FILE).write_text("damaged")
    assert "Not counted" in HtmlPage(write_report(run).read_text("utf-8")).text


def test_texts_of_a_deployment_stay_where_they_are(run: Path) -> None:
    text = (run / "results.json").read_text()
    (run / "results.json").write_text(text.replace('"source": "medmcqa"', '"source": "sites"'))
    with pytest.raises(UserError, match="at its sites, and stay there"):
        count_labels(run, lambda task: None)


def test_other_rows_than_those_of_the_run_are_not_counted(run: Path) -> None:
    results = read_results(run)
    write_row_hashes(results.config.model_copy(update={"run": RunConfig(out=str(run))}))
    record = RunFolder(run).row_hashes
    record.write_text(record.read_text().replace(': "', ': "0', 1))
    with pytest.raises(UserError, match="--labels: the rows of task"):
        count_labels(run, print)
    assert not (run / FILE).exists()
