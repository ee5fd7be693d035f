"""Every page: one file, nothing from outside, readable by eye and by ear."""

from __future__ import annotations

import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from simulations.report.charts import drawings as panels_module
from simulations.report.charts.drawings import (
    Axes,
    Axis,
    Curve,
    Dot,
    Line,
    Panel,
    dots,
    lines,
    panels,
)
from simulations.report.charts.svg import VARIABLES
from simulations.report.command import write_report
from simulations.report.page.blocks import TEMPLATES, Page, Section, Table, Text, render
from tests.simulations.report.html_page import HtmlPage
from tests.stored_results import RESULTS

EXAMPLES = Path(__file__).parent / "examples"
KINDS = {
    "run": EXAMPLES / "plain",
    "private run": EXAMPLES / "private",
    "study": RESULTS / "all-labels-medmcqa",
    "study with settings": RESULTS / "memory",
    "budgets": RESULTS / "budgets",
    "audit": RESULTS / "audit-private",
}
STYLE = (TEMPLATES / "style.css").read_text(encoding="utf-8")


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


def test_every_figure_has_a_text_and_a_table(text: str) -> None:
    figures = re.findall(r"<figure.*?</figure>", text, re.DOTALL)
    drawings = [re.findall(r"<svg[^>]*>", figure) for figure in figures]
    assert all(0 < len(each) < 3 for each in drawings)
    for tag in (tag for each in drawings for tag in each):
        assert 'role="img"' in tag
        assert len(re.search(r'aria-label="([^"]*)"', tag)[1]) > 10  # type: ignore[index]
    for place in re.finditer(r"</figure>", text):
        before, after = text[: place.start()], text[place.end() :]
        own = before.rfind("<table") > before.rfind("<figure")
        following = re.sub(r"^(\s*<figure.*?</figure>)+", "", after, flags=re.DOTALL)
        assert own or following.lstrip().startswith('<div class="scroll"')


def test_panels_draw_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    monkeypatch.setattr(panels_module, "draw", lambda name, alt, size, paint: paint(figure))
    panels("a", "it", [Panel("p", (Line((10.0, None, 30.0)),), level=5.0)], Axes("x", "y"))
    level, line = figure.axes[0].lines
    assert set(level.get_ydata()) == {5.0}
    np.testing.assert_equal(np.array(line.get_ydata(), float), [10.0, np.nan, 30.0])


def test_headings_come_in_order_and_tables_have_captions(text: str) -> None:
    page = HtmlPage(text)
    levels = [int(tag[1]) for tag in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert all(table.caption for table in page.tables)
    for table in page.tables:
        assert len({len(row) for row in table.rows}) == 1


def test_drawings_have_the_colours_of_the_page_and_no_others(text: str) -> None:
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    if drawn:
        assert re.findall(r"#[0-9a-fA-F]{6}\b", drawn) == []
        assert "font-family" not in drawn
        used = set(re.findall(r"var\(--([\w-]+)\)", drawn))
        assert used <= set(VARIABLES.values())
        assert used <= set(re.findall(r"--([\w-]+):", STYLE))


def luminance(colour: str) -> float:
    """Relative, of WCAG 2.2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, two: str) -> float:
    high, low = sorted((luminance(one), luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def palettes() -> list[dict[str, str]]:
    """Of light, dark and print."""
    blocks = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    found = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in blocks]
    assert len(found) == 3
    return found


@pytest.mark.parametrize("number", [0, 1, 2])
def test_text_and_lines_can_be_seen(number: int) -> None:
    colours = palettes()[number]
    for name in ("ink", "muted", "accent", "good", "warn", "bad"):
        for paper in ("paper", "raised"):
            assert contrast(colours[name], colours[paper]) >= 4.5, name
    for i in range(6):
        assert contrast(colours[f"series-{i}"], colours["paper"]) >= 3
    for level in range(10):
        ink = re.search(rf"\.h{level} \{{[^}}]*color: var\(--(low|high)\)", STYLE)
        assert ink is not None
        assert contrast(colours[f"heat-{level}"], colours[ink[1]]) >= 4.5


def test_characters_that_xml_forbids_are_left_out_of_drawings() -> None:
    odd = "bell\x07 and\x1b tab\tumlaut ä 🙂"
    drawn = dots("a", odd, [Dot(odd, 1.0, 0.5)], odd)
    assert "bell and tab" in drawn
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", drawn)
    assert "umlaut ä 🙂" in drawn


def test_what_users_wrote_is_text_and_no_markup() -> None:
    evil = "<script>alert('$x^2$ & more')</script>"
    drawn = [
        panels("a", evil, [Panel(evil, (Line((1.0, None)),))], Axes(evil, evil)),
        dots("b", evil, [Dot(evil, 1.0, 0.5)], evil),
        lines("c", evil, [Curve(evil, (1.0, 2.0), (1.0, 2.0))], Axis(evil, evil)),
    ]
    table = Table(evil, (evil,), ((evil,),))
    made = render(Page("Run", evil, evil, (Section("a", evil, (Text(evil), table)),)))
    for text in (made, *drawn):
        assert "<script" not in text
        assert "$x^2$" in text  # and no formula
    assert HtmlPage(made).table("<script>")[1] == [evil]


def test_no_curve_is_left_out_however_many_there_are() -> None:
    names = [f"method number {n}" for n in range(11)]
    drawn = str(
        lines(
            "many",
            "many",
            [Curve(name, (1, 2), (n, n)) for n, name in enumerate(names)],
            Axis("x", "y"),
        )
    )
    assert all(name in drawn for name in names)
