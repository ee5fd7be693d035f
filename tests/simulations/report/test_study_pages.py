"""The pages of studies, budgets and audits have the figures of their tables, which tests of their
own compare with the cells."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from deal_core.errors import UserError
from simulations.audit.tables import Audit, attack_table, membership_table
from simulations.budgets.results import Budgets
from simulations.budgets.tables import budget_table, sweep_text
from simulations.output.files import TextTable, blocks
from simulations.report.command import write_report
from simulations.report.page.blocks import Tile, Tiles
from simulations.report.study.page import study_page
from simulations.report.study.record import read_study
from simulations.study.results import CellResult, StudyResults
from simulations.study.study_file import StudyFile
from simulations.study.tables import (
    ALL_LABELS,
    age_table,
    all_labels_table,
    arms_table,
    best_settings,
    cost_table,
    measures_of,
    setting_table,
    significance,
)
from tests.simulations.report.html_page import HtmlPage
from tests.slow import slow_but
from tests.stored_results import RESULTS

STUDIES = ["medmcqa", "all-labels-medmcqa", "cl15-core", "standard-cl-llm"]


def copied(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(RESULTS / name, folder / name))


def page(folder: Path) -> HtmlPage:
    return HtmlPage(write_report(folder).read_text(encoding="utf-8"))


def has(shown: HtmlPage, lines: list[str]) -> None:
    """Every table of a part of a Markdown page is on the page, cell by cell."""
    tables = [block for block in blocks(lines) if isinstance(block, TextTable)]
    assert tables
    for table in tables:
        rows = [list(row) for row in (table.columns, *table.rows)]
        assert rows in [found.rows for found in shown.tables]


@pytest.mark.parametrize("name", slow_but(STUDIES, "cl15-core", "standard-cl-llm"))
def test_a_study_has_all_its_tables(name: str, tmp_path: Path) -> None:
    folder = copied(name, tmp_path)
    shown, record = page(folder), read_study(folder)
    study, cells = record.study, record.results.cells
    has(shown, list(arms_table(study, cells)))
    has(shown, list(significance(study, cells)))
    if ALL_LABELS in measures_of(cells):
        has(shown, list(all_labels_table(study, cells)))
    has(shown, list(age_table(study, cells)))
    has(shown, list(cost_table(study, cells)))
    assert f"{len(cells)} of {record.results.wanted}" in shown.text or "complete" in shown.text
    for arm in {cell.arm for cell in cells}:
        assert study.label(arm) in shown.text


@pytest.mark.parametrize("name", ["tuning", "memory"])
def test_a_study_of_settings_has_a_table_for_each(name: str, tmp_path: Path) -> None:
    folder = copied(name, tmp_path)
    shown, record = page(folder), read_study(folder)
    has(shown, list(best_settings(record.study, record.results.cells)))
    has(shown, list(setting_table(record.study, record.results.cells)))
    for setting in {cell.setting for cell in record.results.cells}:
        has(shown, list(arms_table(record.study, record.cells(setting))))


def test_a_study_that_is_not_complete_says_so(tmp_path: Path) -> None:
    folder = copied("medmcqa", tmp_path)
    results = StudyResults.model_validate_json((folder / "study.json").read_text())
    left = results.model_copy(update={"cells": results.cells[:3]})
    (folder / "study.json").write_text(left.model_dump_json())
    shown = page(folder)
    assert f"3 of {results.wanted} cells" in shown.text
    assert f"{results.wanted - 3} of {results.wanted} cells have not finished" in shown.text
    (folder / "study.json").write_text(left.model_copy(update={"cells": []}).model_dump_json())
    assert f"0 of {results.wanted} cells" in page(folder).text


@pytest.mark.slow
def test_labels_are_those_of_the_file_or_else_the_names(tmp_path: Path) -> None:
    folder = copied("medmcqa", tmp_path)
    results = StudyResults.model_validate_json((folder / "study.json").read_text())
    assert "LwF, one softmax" in page(folder).text
    own = read_study(folder).study.file
    arms = {name: arm.model_copy(update={"label": f"my {name}"}) for name, arm in own.arms.items()}
    told = results.model_copy(update={"file": own.model_copy(update={"arms": arms})})
    (folder / "study.json").write_text(told.model_dump_json())
    assert "my lwf" in page(folder).text
    old = results.model_copy(update={"file": None})  # from before schema version 3
    (folder / "study.json").write_text(old.model_dump_json())
    rows = page(folder).table("Arms and measures")
    assert {"lwf", "deal"} <= {row[0] for row in rows}


def measured(folder: Path) -> StudyResults:
    return StudyResults.model_validate_json((folder / "study.json").read_text())


def stored(folder: Path, results: StudyResults, file: StudyFile, cells: list[CellResult]) -> None:
    update = {"study": "mine", "file": file, "cells": cells, "wanted": 4}
    (folder / "study.json").write_text(results.model_copy(update=update).model_dump_json())


def test_cells_that_are_no_longer_in_the_study_are_on_no_part_of_its_page(tmp_path: Path) -> None:
    """An arm has another name, a seed was taken out, and one cell has not been run yet."""
    folder = copied("medmcqa", tmp_path)
    results = measured(folder)
    arms = {"new": {"label": "My method"}, "lwf": {"label": "LwF here"}}
    file = StudyFile.model_validate({"arms": arms, "seeds": [0, 1], "candidate": "new"})
    own = {(cell.arm, cell.seed): cell for cell in results.cells}
    new = own["deal", 0].model_copy(update={"arm": "new"})
    standing = [new, own["lwf", 0], own["lwf", 1]]
    stored(folder, results, file, [*standing, own["deal", 0], own["lwf", 2]])
    for cell in ("new.seed0", "deal.seed0"):
        (folder / "cells" / cell).mkdir(parents=True)
        (folder / "cells" / cell / "report.html").touch()
    shown, record = page(folder), read_study(folder)
    assert "3 of 4 cells" in shown.text
    assert "no longer in the study, and on no part of this page: 2." in shown.text
    assert record.study.file == file
    has(shown, list(arms_table(record.study, standing)))
    has(shown, list(significance(record.study, standing)))
    assert [row[:2] for row in shown.table("Arms and measures")[2:]] == [
        ["My method", "1"],
        ["LwF here", "2"],
    ]
    links = [address for tag, address in shown.addresses if tag == "a"]
    assert [link for link in links if "cells/" in link] == ["cells/new.seed0/report.html"]
    stored(folder, results, file, standing)
    assert "no longer in the study" not in page(folder).text


def tiles(folder: Path) -> dict[str, Tile]:
    (found,) = (
        b for b in study_page(read_study(folder)).sections[0].blocks if isinstance(b, Tiles)
    )
    return {tile.name: tile for tile in found.tiles}


def shown_in(tile: Tile) -> str:
    return tile.cell if isinstance(tile.cell, str) else tile.cell.text


def accurate(cell: CellResult, value: float, **place: object) -> CellResult:
    outcome = cell.outcome.model_copy(update={"average_accuracy": value})
    return cell.model_copy(update={"outcome": outcome, **place})


def test_the_best_contestant_is_best_on_the_cells_that_all_have(tmp_path: Path) -> None:
    """A hard seed that others have not run yet is no fault of its own."""
    folder = copied("medmcqa", tmp_path)
    results = measured(folder)
    one = results.cells[0].model_copy(update={"bound": ""})
    file = StudyFile.model_validate({"arms": {"lwf": {}, "deal": {}}, "seeds": [0, 1]})
    cells = [
        accurate(one, 0.9, arm="lwf", seed=0),
        accurate(one, 0.5, arm="lwf", seed=1),
        accurate(one, 0.8, arm="deal", seed=0),
    ]
    stored(folder, results, file, cells)
    best = tiles(folder)["Best contestant"]
    assert (best.note, shown_in(best)) == ("lwf", "70.0")  # as in the table of the arms


def test_headlines_of_several_settings_are_of_the_best_setting_of_an_arm(tmp_path: Path) -> None:
    """The mean over settings is the accuracy of nothing that was run."""
    folder = copied("medmcqa", tmp_path)
    results = measured(folder)
    one = results.cells[0].model_copy(update={"bound": ""})
    tables = {
        "arms": {"lwf": {}, "deal": {}},
        "candidate": "deal",
        "settings": {"s1": {}, "s2": {}},
    }
    places = {("lwf", "s1"): 0.8, ("lwf", "s2"): 0.1, ("deal", "s1"): 0.5, ("deal", "s2"): 0.7}
    cells = [
        accurate(one, value, arm=arm, setting=setting, seed=0)
        for (arm, setting), value in places.items()
    ]
    stored(folder, results, StudyFile.model_validate(tables), cells)
    found = tiles(folder)
    told = {name: (tile.note, shown_in(tile)) for name, tile in found.items() if name != "Cells"}
    assert told == {
        "Candidate": ("deal, setting s2", "70.0"),
        "Best contestant": ("lwf, setting s1", "80.0"),
    }


def test_the_runs_of_a_study_are_linked_where_they_have_pages(tmp_path: Path) -> None:
    folder = copied("medmcqa", tmp_path)
    for place in ("deal.seed0", "per-task.seed0/surgery"):
        (folder / "cells" / place).mkdir(parents=True)
        (folder / "cells" / place / "report.html").touch()
    links = [address for tag, address in page(folder).addresses if tag == "a"]
    assert [link for link in links if link.startswith("cells/")] == [
        "cells/deal.seed0/report.html",
        "cells/per-task.seed0/surgery/report.html",
    ]


@pytest.mark.parametrize("name", ["budgets", "budgets-held-out", "budgets-wiener"])
def test_budgets_have_their_table_and_what_an_epsilon_means(name: str, tmp_path: Path) -> None:
    folder = copied(name, tmp_path)
    shown = page(folder)
    budgets = Budgets.model_validate_json((folder / "budgets.json").read_text())
    for method in {point.method for point in budgets.points}:
        points = [point for point in budgets.points if point.method == method]
        has(shown, list(budget_table(points, any(p.class_incremental for p in budgets.points))))
    private = next(point for point in budgets.points if point.spent is not None)
    assert f"Spent: epsilon at delta = {private.delta:.2g} per {private.unit}" in shown.text
    assert "over all rounds and tasks; " in shown.text
    assert sweep_text(budgets.sweep) in shown.text


def test_an_audit_has_its_tables_and_its_verdict(tmp_path: Path) -> None:
    folder = copied("audit-private", tmp_path)
    audit = Audit.model_validate_json((folder / "audit.json").read_text())
    shown = page(folder)
    has(shown, list(attack_table(audit)))
    has(shown, list(membership_table(audit)))
    assert "No attack refutes a claim" in shown.text
    drawn = shown.table("Claims and lower bounds")
    attacks = [each for cell in audit.cells for each in cell.attacks]
    assert [row[2] for row in drawn[1:]] == [f"{each.bound.epsilon:.3g}" for each in attacks]
    assert "at delta = 1e-05 per record, over all rounds and tasks, against everybody" in shown.text


def test_a_refuted_claim_cannot_be_missed(tmp_path: Path) -> None:
    folder = copied("audit-private", tmp_path)
    data = json.loads((folder / "audit.json").read_text())
    data["cells"][0]["attacks"][0]["p_value"] = 1e-6
    (folder / "audit.json").write_text(json.dumps(data))
    text = page(folder).text
    assert "a claim is refuted" in text
    assert "1 attacks refute what the ledger claims" in text


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("study.json", "no figures of a study"),
        ("budgets.json", "no budget study"),
        ("audit.json", "no audit"),
    ],
)
def test_a_damaged_file_is_one_line(file: str, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text("{")
    with pytest.raises(UserError, match=message) as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)
