"""The docs site, as `make docs` builds it: no warning, and no link that leads nowhere.

Needs the extra `docs`: pip install --editable '.[docs]'."""

import re
import subprocess
import sys

import pytest

from tests.docs.pages import ROOT

pytest.importorskip("zensical")
pytest.importorskip("latex2mathml")
PROGRAM = "docs/site/gather_pages.py"


def call(*words, cwd=ROOT):
    done = subprocess.run([*map(str, words)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    call(sys.executable, PROGRAM, folder)
    said = call(sys.executable, "-m", "zensical", "build", "--clean", "--strict", cwd=folder)
    assert "No issues found" in said
    return folder


def test_a_page_asks_for_nothing_from_elsewhere(built):
    for file in (built / "site").rglob("*.html"):
        loaded = re.findall(
            r"<(?!a\b)\w[^>]*\b(?:src|href)=[\"']?([^\"'> ]+)", file.read_text("utf-8")
        )
        assert [each for each in loaded if "://" in each or each.startswith("//")] == [], file


def test_equations_are_shown_without_a_script(built):
    source = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    page = (built / "site/docs/method/index.html").read_text(encoding="utf-8")
    assert page.count("<math") == source.count("```math") > 40
    equations = [part.partition("</math>")[0] for part in page.split("<math")[1:]]
    assert re.findall(r".*?\\.{9}", "".join(equations)) == []  # no command is left over
