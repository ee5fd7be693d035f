"""The docs site, as `make docs` builds it: no warning, and every link leads somewhere.

Needs the extra `docs`: pip install --editable '.[docs]'."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.docs.pages import ROOT

pytest.importorskip("zensical")
pytest.importorskip("latex2mathml")
PROGRAM = "docs/site/gather_pages.py"


def call(*words: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run([*map(str, words)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    call(sys.executable, PROGRAM, folder)
    said = call(sys.executable, "-m", "zensical", "build", "--clean", "--strict", cwd=folder)
    assert "No issues found" in said
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


def test_every_address_of_the_site_is_there_and_nothing_comes_from_elsewhere(built: Path) -> None:
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
    loads = {address for page in pages.values() for address in page.loads}
    assert [address for address in loads if "://" in address or address.startswith("//")] == []


def test_equations_are_shown_without_a_script(built: Path) -> None:
    source = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    page = (built / "site/docs/method/index.html").read_text(encoding="utf-8")
    assert page.count("<math") == source.count("```math") > 40
    equations = [part.partition("</math>")[0] for part in page.split("<math")[1:]]
    assert re.findall(r".*?\\.{9}", "".join(equations)) == []  # no command is left over
