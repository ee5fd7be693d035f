"""Every page: one file, nothing from outside, readable by eye and by ear. Those of studies and
audits have the figures of their tables, which tests of their own compare with the cells."""

import csv
import json
import re
import shutil
from base64 import b64decode
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from simulations.audit.command import Audit, attack_table
from simulations.output import Table
from simulations.report import blocks
from simulations.report.blocks import Curve, Dot, Page, Section, Text, dots, lines, render
from simulations.report.commands import write_report
from simulations.report.study import tex
from simulations.study import tables
from simulations.study.grid import Study, StudyFile, load_study
from simulations.study.results import StudyResults
from tests.simulations.report.html_page import HtmlPage
from tests.simulations.study.test_tables import UNDER_BUDGETS
from tests.stored_results import RESULTS

STORED = {"study": RESULTS / "all-labels-medmcqa", "audit": RESULTS / "audit-private"}


def drawn(address):
    head, _, body = address.partition(",")
    assert head == "data:image/svg+xml;base64"
    return b64decode(body).decode()


@pytest.fixture(scope="module")
def written(examples, tmp_path_factory):
    """A folder of each kind, with its report."""
    above, kinds = tmp_path_factory.mktemp("written"), {"run": examples / "plain", **STORED}
    return {kind: write_report(copied(path, above)).parent for kind, path in kinds.items()}


def read_page(folder):
    return HtmlPage((folder / "report.html").read_text(encoding="utf-8"))


def page(folder):
    return read_page(write_report(folder).parent)


def copied(path, folder):
    return Path(shutil.copytree(path, folder / path.name))


@pytest.mark.parametrize("kind", ["run", *STORED])
def test_a_page_is_one_file_in_order_with_nothing_from_outside(kind, written):
    text = (written[kind] / "report.html").read_text(encoding="utf-8")
    page = HtmlPage(text)
    assert {"script", "iframe", "object", "embed", "svg"} & set(page.tags) == set()
    for tag, address in page.addresses:
        assert address.startswith("#") or (tag, address[:5]) in {
            ("link", "data:"),
            ("img", "data:"),
        }
    assert "url(" not in text
    assert "@import" not in text
    assert not re.search(r"https?://", text)
    assert "default-src 'none'" in text
    assert len(page.ids) == len(set(page.ids))
    referred = {address[1:] for _, address in page.addresses if address.startswith("#")}
    assert (referred | set(page.described)) - set(page.ids) == set()
    levels = [int(tag[1]) for tag in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    for table in page.tables:
        assert table.caption
        assert len({len(row) for row in table.rows}) == 1
    pictures = [address for tag, address in page.addresses if tag == "img"]
    assert len(re.findall(r'<img src="[^"]+" alt="[^"]{10,}">', text)) == len(pictures)
    assert all("</svg>" in drawn(address) for address in pictures)
    assert bool(pictures) == (kind != "audit")  # an audit is tables alone


def test_what_users_wrote_is_text_and_no_markup():
    evil = "<script>$x^2$ & \\1</script>bell\x07 ä"
    drawings = [
        dots(evil, [Dot(evil, 1.0, 0.5, marked=False, hollow=False)], "x", (1.0, "it")),
        lines(evil, [Curve(evil, (1.0, 2.0), (1.0, 2.0))], ("x", "y"), levels=[(1.0, evil)]),
    ]
    table = Table(evil, (evil,), ((evil,),))
    blocks = (Text(evil), table, *drawings)
    made = render(Page("Run", evil, evil, (Section("a", evil, blocks),)))
    assert "<script" not in made
    assert HtmlPage(made).table("<script>")[1] == [evil]
    for drawing in drawings:
        text = drawn(drawing.address)
        assert "&lt;script&gt;$x^2$" in text
        assert not re.search(r"[\x00-\x08\x0b-\x1f]", text)


def test_lines_draw_curves_with_their_values(monkeypatch):
    from matplotlib.figure import Figure

    curve = Curve("method", (1, 2, 3), (10.0, None, 30.0))
    figure = Figure()
    monkeypatch.setattr(blocks, "draw", lambda height, paint, form: paint(figure))
    lines("it", [curve], ("x", "y"), levels=[(5.0, "five")]).drawn("svg")
    level, line = figure.axes[0].lines
    assert set(level.get_ydata()) == {5.0}
    np.testing.assert_equal(np.array(line.get_ydata(), float), [10.0, np.nan, 30.0])
    ticks = figure.axes[0].get_xticks()
    assert [tick for tick in ticks if tick != round(tick)] == []  # tasks and rounds are whole


def read(folder):
    results = StudyResults.model_validate_json((folder / "study.json").read_text())
    return Study(results.study, folder, results.file), results


def has(shown, *parts):
    """Every table is on the page, cell by cell, and every paragraph."""
    for part in parts:
        if isinstance(part, str):
            assert part in shown.text
        else:
            assert part is not None
            rows = [list(row) for row in (part.columns, *part.rows)]
            assert rows in [found.rows for found in shown.tables]


def test_a_study_has_all_its_tables(written):
    shown, (study, results) = read_page(written["study"]), read(written["study"])
    cells = results.standing
    has(
        shown,
        tables.arms_table(study, cells),
        tables.class_il_table(study, cells),
        tables.cost_table(study, cells),
        tables.age_table(study, cells),
        *tables.on_all_tests(study, cells),
        *tables.significance(study, cells),
        *tables.significance(study, cells, tables.CLASS_IL),
    )


def test_a_study_writes_what_a_paper_takes_of_it(written):
    folder = written["study"]
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


@pytest.mark.usefixtures("undrawn")
def test_a_study_of_settings_has_a_table_for_each(tmp_path):
    folder = copied(RESULTS / "memory", tmp_path)
    shown, (study, results) = page(folder), read(folder)
    has(shown, *tables.setting_tables(study, results.cells))
    for setting in {cell.setting for cell in results.cells}:
        own = [cell for cell in results.cells if cell.setting == setting]
        has(shown, tables.arms_table(study, own))


@pytest.mark.usefixtures("undrawn")
def test_a_study_of_budgets_has_what_they_mean(tmp_path):
    (tmp_path / "mine.toml").write_text('epsilons = "1,8,inf"\nseeds = [0, 1]\n[arms.deal]\n')
    study = load_study(str(tmp_path / "mine.toml"))
    results = StudyResults(
        study="mine", description="", wanted=6, defaults={}, cells=UNDER_BUDGETS, file=study.file
    )
    (tmp_path / "study.json").write_text(results.model_dump_json())
    shown = page(tmp_path)
    has(
        shown,
        tables.budget_table(study, "deal", UNDER_BUDGETS),
        *tables.meanings(UNDER_BUDGETS),
        tables.sweep_text(UNDER_BUDGETS),
    )
    assert "at delta = 1e-05 per record, over all rounds and tasks; nobody." in shown.text


def stored(folder, results, file, cells):
    update = {"study": "mine", "file": file, "cells": cells, "wanted": 4}
    (folder / "study.json").write_text(results.model_copy(update=update).model_dump_json())


@pytest.mark.usefixtures("undrawn")
def test_only_cells_that_are_in_the_study_are_on_its_page(tmp_path):
    """An arm has another name, a seed was taken out, and one cell has not been run yet."""
    folder = copied(RESULTS / "medmcqa", tmp_path)
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


def test_an_audit_has_its_tables_and_its_verdict(tmp_path):
    folder = copied(RESULTS / "audit-private", tmp_path)
    audit = Audit.model_validate_json((folder / "audit.json").read_text())
    shown = page(folder)
    has(shown, attack_table(audit))
    assert "No attack refutes a claim" in shown.text
    assert "at delta = 1e-05 per record, over all rounds and tasks, against everybody" in shown.text
    data = json.loads((folder / "audit.json").read_text())
    data["cells"][0]["p_value"] = 1e-6
    (folder / "audit.json").write_text(json.dumps(data))
    assert "1 attacks refute what the ledger claims" in page(folder).text
