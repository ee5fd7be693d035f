"""Docstrings cite what there is: equations of docs/method.md, and pages."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("client", "deal_core", "server", "simulations")
CITED = re.compile(r"\(M(\d+)\)(?: to \(M(\d+)\))?|docs/method\.md, M(\d+)\b")


def docstrings():
    """Of modules, classes, functions and attributes of all packages."""
    return [
        str(node.value.value)
        for name in PACKAGES
        for path in (ROOT / name).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ]


def test_every_equation_is_cited_where_it_is_computed_and_every_page_is_there():
    equations = set(re.findall(r"\\tag\{M(\d+)\}", (ROOT / "docs/method.md").read_text("utf-8")))
    numbers = set()
    for text in docstrings():
        for first, last, alone in CITED.findall(text):
            begin = int(first or alone)
            numbers |= {str(number) for number in range(begin, int(last or begin) + 1)}
        for page in re.findall(r"\bdocs/[\w.-]+\.md\b|\bsimulations/[A-Z]+\.md\b", text):
            assert (ROOT / page).exists(), page
    assert numbers == equations
