"""The docs site, as `make docs` builds it: no warning, and every link leads somewhere.

Needs the extra `docs`: pip install --editable '.[docs]'."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.docs.pages import ROOT

pytest.importorskip("zensical")
pytest.importorskip("latex2mathml")
PROGRAM = "docs/site/gather_pages.py"


def call(*words: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, words)], cwd=cwd, capture_output=True, text=True)


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    return call(sys.executable, "-m", "zensical", "build", "--clean", "--strict", cwd=folder)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    gathered = call(sys.executable, PROGRAM, folder)
    assert gathered.returncode == 0, gathered.stderr
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No issues found" in done.stdout + done.stderr
    return folder


class Page(HTMLParser):
    """Addresses and ids of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.addresses: set[str] = set()
        self.ids: set[str] = set()
        self.loads: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids.add(found.get("id") or "")
        for address in (found.get("href"), found.get("src")):
            if address is not None:
                self.addresses.add(address)
                if tag != "a":
                    self.loads.add(address)


def test_every_address_of_the_site_is_there(built: Path) -> None:
    site = built / "site"
    pages = {file: Page(file) for file in site.rglob("*.html") if file.name != "404.html"}
    assert len(pages) > 40
    missing = []
    for file, page in pages.items():
        for address in page.addresses:
            path, _, anchor = unquote(address).partition("#")
            if "://" in address or path.startswith(("mailto:", "data:", "javascript:")):
                continue
            target = (file.parent / path).resolve() if path else file
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (anchor and anchor not in pages[target].ids):
                missing.append(f"{file.relative_to(site)}: {address}")
    assert missing == []


def test_a_page_asks_for_nothing_from_elsewhere(built: Path) -> None:
    loads = {a for file in (built / "site").rglob("*.html") for a in Page(file).loads}
    assert [address for address in loads if "://" in address or address.startswith("//")] == []


def test_every_page_of_docs_is_in_the_menu(built: Path) -> None:
    def files(entry: object) -> set[str]:
        if isinstance(entry, str):
            return {entry}
        inner = entry.values() if isinstance(entry, dict) else entry
        return set().union(*map(files, inner))  # type: ignore[call-overload]

    menu = files(tomllib.loads((built / "zensical.toml").read_text())["project"]["nav"])
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= menu
    assert [name for name in menu if not (built / "pages" / name).is_file()] == []


def test_equations_are_shown_without_a_script(built: Path) -> None:
    source = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    page = (built / "site/docs/method/index.html").read_text(encoding="utf-8")
    assert page.count("<math") == source.count("```math") > 40
    equations = [part.partition("</math>")[0] for part in page.split("<math")[1:]]
    assert re.findall(r".*?\\.{9}", "".join(equations)) == []  # no command is left over
    assert '(<mrow><mi mathvariant="normal">M</mi><mn>1</mn></mrow>' in equations[0].replace(
        '<mo stretchy="false">&#x00028;</mo>', "("
    )


def test_a_link_that_leads_nowhere_fails(built: Path, tmp_path: Path) -> None:
    (tmp_path / "pages/docs").mkdir(parents=True)
    (tmp_path / "zensical.toml").write_text('[project]\nsite_name = "x"\ndocs_dir = "pages"\n')
    (tmp_path / "pages/README.md").write_text("# A\n[b](docs/b.md) [here](#a)\n")
    (tmp_path / "pages/docs/b.md").write_text("# B\n")
    assert build(tmp_path).returncode == 0
    (tmp_path / "pages/README.md").write_text("# A\n[b](docs/b.md#nowhere)\n")
    assert build(tmp_path).returncode != 0
