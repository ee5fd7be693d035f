"""Every page: one file, nothing from outside, readable by eye and by ear."""

from __future__ import annotations

import re
import shutil
from itertools import pairwise

import numpy as np
import pytest

from simulations.report import charts
from simulations.report.blocks import HERE, Page, Section, Table, Text, render
from simulations.report.charts import VARIABLES, Curve, Dot, dots, lines
from simulations.report.commands import write_report
from tests.simulations.report.html_page import EXAMPLES, HtmlPage
from tests.stored_results import RESULTS

KINDS = {
    "private run": EXAMPLES / "private",
    "study": RESULTS / "all-labels-medmcqa",
    "study with settings": RESULTS / "memory",
    "audit": RESULTS / "audit-private",
}
STYLE = (HERE / "style.css").read_text(encoding="utf-8")


@pytest.fixture(scope="module", params=KINDS)
def text(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page") / "it"
    shutil.copytree(KINDS[request.param], folder)
    return write_report(folder).read_text(encoding="utf-8")


def test_nothing_is_asked_for_from_outside(text: str) -> None:
    page = HtmlPage(text)
    assert {"script", "iframe", "object", "embed", "img"} & set(page.tags) == set()
    for tag, address in page.addresses:
        assert address.startswith("#") or (tag, address) == ("link", "data:,")
    assert set(re.findall(r"url\(([^)]{0,1})", text)) <= {"#"}
    assert "@import" not in text
    assert not re.search(r"https?://", text)
    assert "default-src 'none'" in text


def test_names_are_unique_and_what_is_referred_to_is_there(text: str) -> None:
    page = HtmlPage(text)
    assert len(page.ids) == len(set(page.ids))
    referred = {address[1:] for _, address in page.addresses if address.startswith("#")}
    referred |= set(re.findall(r"url\(#([^)]+)\)", text)) | set(page.described)
    assert referred - set(page.ids) == set()


def test_it_reads_in_order_and_drawings_have_a_text_and_the_colours_of_the_page(text: str) -> None:
    page = HtmlPage(text)
    levels = [int(tag[1]) for tag in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    for table in page.tables:
        assert table.caption
        assert len({len(row) for row in table.rows}) == 1
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert drawings or "Attacks on what is promised" in text  # an audit is tables alone
    for drawn in drawings:
        assert re.match(r'<svg viewBox="[\d. ]+" role="img" aria-label="[^"]{10,}">', drawn)
        assert re.findall(r"#[0-9a-fA-F]{6}\b", drawn) == []
        assert "font-family" not in drawn
        used = set(re.findall(r"var\(--([\w-]+)\)", drawn))
        assert used <= set(VARIABLES.values()) & set(re.findall(r"--([\w-]+):", STYLE))


def test_lines_draw_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    monkeypatch.setattr(charts, "draw", lambda caption, height, paint: paint(figure))
    lines("it", [Curve("", (1, 2, 3), (10.0, None, 30.0))], ("x", "y"), levels=[(5.0, "five")])
    level, line = figure.axes[0].lines
    assert set(level.get_ydata()) == {5.0}
    np.testing.assert_equal(np.array(line.get_ydata(), float), [10.0, np.nan, 30.0])


def test_what_users_wrote_is_text_and_no_markup() -> None:
    evil = "<script>alert('$x^2$ & \\1 more')</script>bell\x07 and\x1b umlaut ä 🙂"
    drawn = [
        str(dots(evil, [Dot(evil, 1.0, 0.5)], evil).svg),
        str(lines(evil, [Curve(evil, (1.0, 2.0), (1.0, 2.0))], (evil, evil)).svg),
    ]
    table = Table(evil, (evil,), ((evil,),))
    made = render(Page("Run", evil, evil, (Section("a", evil, (Text(evil), table)),)))
    for text in (made, *drawn):
        assert "<script" not in text
        assert "$x^2$" in text  # and no formula
    for text in drawn:
        assert not re.search(r"[\x00-\x08\x0b-\x1f]", text)
        assert "bell and umlaut ä 🙂" in text
    assert HtmlPage(made).table("<script>")[1] == [evil]


def test_no_curve_is_left_out_however_many_there_are() -> None:
    names = [f"method number {n}" for n in range(11)]
    curves = [Curve(name, (1, 2), (n, n)) for n, name in enumerate(names)]
    drawn = str(lines("many", curves, ("x", "y")).svg)
    assert all(name in drawn for name in names)
