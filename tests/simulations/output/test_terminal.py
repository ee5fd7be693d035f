"""Pages and tables on a terminal: nothing wider than promised, nothing cut off."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from simulations.audit import command as audit_tables
from simulations.output.console import NARROW, PAGE_WIDTH, print_page, text_table
from simulations.output.files import TextTable, blocks, head, read_table, row
from simulations.study.command import SHOWN, print_summary
from simulations.study.page import markdown
from simulations.study.results import StudyResults
from simulations.study.study_file import Study
from tests.stored_results import RESULTS

WIDE = 200


def shown(page: str, width: int = WIDE) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_page(console, page)
    return console.file.getvalue()  # type: ignore[attr-defined]


def letters(text: str) -> str:
    """All that is no space, no frame, and no mark of Markdown."""
    return "".join(c for c in text if c.isalnum() or c in "±≥×%")


@pytest.mark.parametrize("values", [("a", "1"), ("a | b", "2"), ("| a |", ""), ("\\", "x|y|z")])
def test_a_row_is_read_as_it_was_written(values: tuple[str, str]) -> None:
    table = read_table([*head("one", "two | three"), row(*values)])
    assert table == TextTable(("one", "two | three"), (False, True), (values,))


def test_a_page_is_tables_and_what_is_between_them() -> None:
    lines = ["# Title", "", *head("a", "b"), row("x", "1"), "", "more", "still more"]
    table = TextTable(("a", "b"), (False, True), (("x", "1"),))
    assert list(blocks(lines)) == ["# Title", table, "more\nstill more"]


def page_of(figures: Path) -> str:
    """The page that a command writes beside its figures."""
    folder = figures.parent
    if figures.name == "study.json":
        return markdown(*read_study(folder))
    text = figures.read_text(encoding="utf-8")
    return audit_tables.markdown(audit_tables.Audit.model_validate_json(text))


def read_study(folder: Path) -> tuple[Study, StudyResults]:
    """A study and its results, of the cells that are in it."""
    text = (folder / "study.json").read_text(encoding="utf-8")
    results = StudyResults.model_validate_json(text)
    assert results.file is not None
    study = Study(results.study, folder, results.file)
    return study, results.model_copy(update={"cells": results.standing})


@pytest.mark.parametrize(
    "figures",
    sorted(path for path in RESULTS.glob("*/*.json") if path.name in ("study.json", "audit.json")),
    ids=lambda p: f"{p.parent.name}",
)
def test_no_page_is_wider_than_a_hundred_columns_and_nothing_of_it_is_lost(figures: Path) -> None:
    text = page_of(figures)
    out = shown(text)
    assert max(len(line) for line in out.splitlines()) <= PAGE_WIDTH
    all_shown = letters(out)
    for block in blocks(text.splitlines()):
        if isinstance(block, TextTable):
            assert "…" not in out or "…" in text
            for cells in block.rows:
                for cell in cells:  # cells of several lines are interleaved with their neighbours
                    words = (letters(word) for word in cell.split())
                    assert all(word in all_shown for word in words if len(word) < 8)


@pytest.mark.parametrize("name", ["medmcqa", "all-labels-medmcqa", "cl15-core", "tuning"])
def test_a_study_ends_with_a_table_of_eighty_columns(name: str) -> None:
    console = Console(file=io.StringIO(), width=WIDE)
    study, results = read_study(RESULTS / name)
    print_summary(console, study, results)
    out = console.file.getvalue()  # type: ignore[attr-defined]
    lines = out.splitlines()
    assert max(map(len, lines)) <= NARROW
    if len(study.file.settings) < 2:
        assert {"arm", "n"} < set(" ".join(lines[1:4]).split()) & set(" ".join(SHOWN).split())
    for arm in {cell.arm for cell in results.cells}:
        assert letters(study.label(arm))[:6] in letters(out)


def test_names_in_a_table_are_no_markup() -> None:
    console = Console(file=io.StringIO(), width=WIDE)
    table = TextTable(("setting", "[red]run"), (False, False), (("[bold]key", "1"),))
    console.print(text_table(table, "of [blue]"))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(name in said for name in ("[red]run", "[bold]key", "of [blue]"))
