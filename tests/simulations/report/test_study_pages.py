"""The pages of studies, budgets and audits have the figures of their tables, which tests of their
own compare with the cells."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

from simulations.audit.command import Audit, attack_table
from simulations.output import Table
from simulations.report.commands import write_report
from simulations.report.study import tex
from simulations.study import tables
from simulations.study.grid import Study, StudyFile, load_study
from simulations.study.results import CellResult, StudyResults
from simulations.study.tables import budget_table, meanings, sweep_text
from tests.simulations.report.html_page import HtmlPage
from tests.simulations.study.test_tables import UNDER_BUDGETS as CELLS
from tests.stored_results import RESULTS


def copied(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(RESULTS / name, folder / name))


def page(folder: Path) -> HtmlPage:
    return HtmlPage(write_report(folder).read_text(encoding="utf-8"))


def read(folder: Path) -> tuple[Study, StudyResults]:
    results = StudyResults.model_validate_json((folder / "study.json").read_text())
    return Study(results.study, folder, results.file), results


def has(shown: HtmlPage, *tables: Table | str | None) -> None:
    """Every table is on the page, cell by cell, and every paragraph."""
    for table in tables:
        if isinstance(table, str):
            assert table in shown.text
        else:
            assert table is not None
            rows = [list(row) for row in (table.columns, *table.rows)]
            assert rows in [found.rows for found in shown.tables]


def test_a_study_has_all_its_tables(tmp_path: Path) -> None:
    folder = copied("all-labels-medmcqa", tmp_path)
    shown, (study, results) = page(folder), read(folder)
    cells = results.standing
    has(
        shown,
        tables.arms_table(study, cells),
        tables.class_il_table(study, cells),
        tables.cost_table(study, cells),
    )
    has(shown, tables.age_table(study, cells), *tables.on_all_tests(study, cells))
    has(
        shown,
        *tables.significance(study, cells),
        *tables.significance(study, cells, tables.CLASS_IL),
    )


def test_a_study_writes_what_a_paper_takes_of_it(tmp_path: Path) -> None:
    folder = copied("all-labels-medmcqa", tmp_path)
    write_report(folder)
    study, results = read(folder)
    made = tables.arms_table(study, results.standing)
    lines = (folder / "paper/arms-and-measures.tex").read_text().splitlines()
    assert [lines[place] for place in (2, 4, -2, -1)] == [
        *(r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}")
    ]
    assert len(lines) == len(made.rows) + 7
    for y, x in made.best:
        cell = made.rows[y][x].replace("±", r"$\pm$")
        assert rf"\textbf{{{cell}}}" in lines[5 + y]
    assert tex("a_b & 50 % ± 1") == r"a\_b \& 50 \% $\pm$ 1"
    with (folder / "paper/cells.csv").open(newline="") as file:
        told = list(csv.DictReader(file))
    assert [float(row["Task-IL accuracy"]) for row in told] == [
        cell.outcome.average_accuracy for cell in results.standing
    ]
    drawn = sorted((folder / "paper").glob("task-il-accuracy-of-every-arm.*"))
    assert [path.suffix for path in drawn] == [".pdf", ".svg"]
    assert [path.read_bytes()[:5] for path in drawn] == [b"%PDF-", b"<?xml"]


def test_a_study_of_settings_has_a_table_for_each(tmp_path: Path) -> None:
    folder = copied("memory", tmp_path)
    shown, (study, results) = page(folder), read(folder)
    has(shown, *tables.setting_tables(study, results.cells))
    for setting in {cell.setting for cell in results.cells}:
        own = [cell for cell in results.cells if cell.setting == setting]
        has(shown, tables.arms_table(study, own))


def test_a_study_of_budgets_has_what_they_mean(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('epsilons = "1,8,inf"\nseeds = [0, 1]\n[arms.deal]\n')
    study = load_study(str(tmp_path / "mine.toml"))
    results = StudyResults(
        study="mine", description="", wanted=6, defaults={}, cells=CELLS, file=study.file
    )
    (tmp_path / "study.json").write_text(results.model_dump_json())
    shown = page(tmp_path)
    has(shown, budget_table(study, "deal", CELLS), *meanings(CELLS), sweep_text(CELLS))
    assert "at delta = 1e-05 per record, over all rounds and tasks; nobody." in shown.text


def stored(folder: Path, results: StudyResults, file: StudyFile, cells: list[CellResult]) -> None:
    update = {"study": "mine", "file": file, "cells": cells, "wanted": 4}
    (folder / "study.json").write_text(results.model_copy(update=update).model_dump_json())


def test_only_cells_that_are_in_the_study_are_on_its_page(tmp_path: Path) -> None:
    """An arm has another name, a seed was taken out, and one cell has not been run yet."""
    folder = copied("medmcqa", tmp_path)
    _, results = read(folder)
    arms = {"new": {"label": "My method"}, "lwf": {"label": "LwF here"}}
    file = StudyFile.model_validate({"arms": arms, "seeds": [0, 1], "candidate": "new"})
    own = {(cell.arm, cell.seed): cell for cell in results.cells}
    new = own["deal", 0].model_copy(update={"arm": "new"})
    standing = [new, own["lwf", 0], own["lwf", 1]]
    stored(folder, results, file, [*standing, own["deal", 0], own["lwf", 2]])
    for cell in ("new.seed0", "deal.seed0"):
        (folder / "cells" / cell).mkdir(parents=True)
        (folder / "cells" / cell / "report.html").touch()
    shown = page(folder)
    assert "3 of 4 cells" in shown.text
    assert "1 of 4 cells have not finished" in shown.text
    has(shown, *tables.significance(Study("mine", folder, file), standing))
    assert [row[:2] for row in shown.table("Arms and measures")[2:]] == [
        ["My method", "1"],
        ["LwF here", "2"],
    ]
    links = [address for tag, address in shown.addresses if tag == "a"]
    assert [link for link in links if "cells/" in link] == ["cells/new.seed0/report.html"]
    stored(folder, results, file, [])
    assert "0 of 4 cells" in page(folder).text


def test_an_audit_has_its_tables_and_its_verdict(tmp_path: Path) -> None:
    folder = copied("audit-private", tmp_path)
    audit = Audit.model_validate_json((folder / "audit.json").read_text())
    shown = page(folder)
    has(shown, attack_table(audit))
    assert "No attack refutes a claim" in shown.text
    assert "at delta = 1e-05 per record, over all rounds and tasks, against everybody" in shown.text
    data = json.loads((folder / "audit.json").read_text())
    data["cells"][0]["p_value"] = 1e-6
    (folder / "audit.json").write_text(json.dumps(data))
    text = page(folder).text
    assert "a claim is refuted" in text
    assert "1 attacks refute what the ledger claims" in text
