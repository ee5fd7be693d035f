"""The map in docs/architecture.md is the tree, and its import orders are the contracts."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
PACKAGES = ("client", "deal_core", "server", "simulations")
MANY = ("research", "tests")
"""Folders whose own folders are as many as what they hold: the map names them alone."""


def table(title: str) -> dict[str, str]:
    section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `([^`]+)` \| (.+) \|$", section, flags=re.MULTILINE))


def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("no git: what is kept and what is only here cannot be told apart")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [Path(name) for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_every_folder_of_the_packages_is_in_the_map_with_its_own_words() -> None:
    found = {}
    for package in PACKAGES:
        for file in (ROOT / package).rglob("__init__.py"):
            words = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            found[str(file.parent.relative_to(ROOT))] = words.partition("\n")[0]
    assert table("Packages") == found


def test_everything_else_is_in_the_map_and_exists() -> None:
    named = set(table("Everything else"))
    assert [name for name in named if not (ROOT / name).exists()] == []
    mapped = named | set(table("Packages"))
    missing = set()
    for file in tracked():
        if len(file.parts) == 1:
            missing |= {str(file)} - mapped
            continue
        folder = str(file.parent)
        inside = any(folder == many or folder.startswith(f"{many}/") for many in MANY)
        missing |= set() if inside else {folder} - mapped
    assert missing == set()


def test_paths_that_people_write_are_read_in_one_place() -> None:
    """``~nobody`` is a line there, and a traceback elsewhere."""
    files = [f for package in PACKAGES for f in (ROOT / package).rglob("*.py")]
    users = [f for f in files if ".expanduser(" in f.read_text(encoding="utf-8")]
    assert [str(f.relative_to(ROOT)) for f in users] == ["deal_core/errors.py"]


def test_every_file_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`((?:client|server|deal_core|simulations)/[\w/.]+)`", PAGE))
    assert len(named) > 30
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    ("line", "container"),
    [
        ("deal_core", "deal_core"),
        ("privacy", "deal_core.privacy"),
        ("methods", "deal_core.methods"),
        ("simulations", "simulations"),
        ("deployment", "simulations.deployment"),
    ],
)
def test_the_order_of_imports_is_the_contract(line: str, container: str) -> None:
    found = re.search(rf"^{line}: +(.+)$", PAGE, flags=re.MULTILINE)
    assert found is not None
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = [
        contract["layers"]
        for contract in contracts["contracts"]
        if contract.get("containers") == [container]
    ]
    written = found[1].replace(", ", " : ").split(" → ")
    assert layers == [written]
