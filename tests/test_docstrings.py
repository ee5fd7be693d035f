"""Docstrings name what there is: attributes, and equations of docs/method.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("client", "deal_core", "server", "simulations")
FILES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
EQUATIONS = set(re.findall(r"\\tag\{M(\d+)\}", (ROOT / "docs/method.md").read_text("utf-8")))
CITED = re.compile(r"\(M(\d+)\)(?: to \(M(\d+)\))?|docs/method\.md, M(\d+)\b")


def docstrings(path: Path) -> Iterator[str]:
    """Of modules, classes, functions and attributes."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield str(node.value.value)


def cited(text: str) -> set[str]:
    """Numbers of the equations that a text cites, ranges spelt out."""
    numbers = set()
    for first, last, alone in CITED.findall(text):
        begin = int(first or alone)
        numbers |= {str(number) for number in range(begin, int(last or begin) + 1)}
    return numbers


def test_every_equation_is_cited_where_it_is_computed_and_no_other() -> None:
    numbers = set()
    for path in FILES:
        for text in docstrings(path):
            numbers |= cited(text)
    assert numbers == EQUATIONS


def test_no_docstring_cites_a_page_that_is_not_here() -> None:
    missing = []
    for path in FILES:
        for text in docstrings(path):
            pages = re.findall(r"\bdocs/[\w.-]+\.md\b|\bsimulations/[A-Z]+\.md\b", text)
            missing += [(path, page) for page in pages if not (ROOT / page).exists()]
            missing += [(path, page) for page in re.findall(r"\b(?:METHOD|DESIGN|RESULTS),", text)]
    assert missing == []


def attributes(node: ast.ClassDef) -> set[str]:
    """What instances of a class have: fields, methods, and what methods set."""
    names = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
    for each in ast.walk(node):
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
            names.add(each.target.id)
        if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name):
            names |= {each.attr} if each.value.id == "self" else set()
        if isinstance(each, ast.FunctionDef) and each.name == "__init__":
            names |= {argument.arg for argument in each.args.args}
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_attributes_are_called_as_they_are(package: str) -> None:
    wrong = []
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ClassDef):
                continue
            section = re.search(
                r"^Attributes:\n((?:    .*(?:\n|$)|\n)+)", ast.get_docstring(node) or "", re.M
            )
            for names in re.findall(
                r"^    ([a-z]\w*(?:, \w+)*): ", section[1] if section else "", re.M
            ):
                unknown = set(names.split(", ")) - attributes(node)
                wrong += [(path.name, node.name, name) for name in unknown]
    assert wrong == []
