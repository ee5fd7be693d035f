"""Every page: one file, nothing from outside, readable by eye and by ear."""

from __future__ import annotations

import re
import shutil
from base64 import b64decode
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from simulations.report import blocks
from simulations.report.blocks import Curve, Dot, Page, Section, Table, Text, dots, lines, render
from simulations.report.commands import write_report
from tests.simulations.report.html_page import EXAMPLES, HtmlPage
from tests.stored_results import RESULTS

KINDS = {
    "run": EXAMPLES / "plain",
    "study": RESULTS / "all-labels-medmcqa",
    "audit": RESULTS / "audit-private",
}


def drawn(address: str) -> str:
    head, _, body = address.partition(",")
    assert head == "data:image/svg+xml;base64"
    return b64decode(body).decode()


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_one_file_in_order_with_nothing_from_outside(kind: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(KINDS[kind], tmp_path / "it"))
    text = write_report(folder).read_text(encoding="utf-8")
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


def test_what_users_wrote_is_text_and_no_markup() -> None:
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


def test_lines_draw_curves_with_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    curve = Curve("method", (1, 2, 3), (10.0, None, 30.0))
    figure = Figure()
    monkeypatch.setattr(blocks, "draw", lambda height, paint, form: paint(figure))
    lines("it", [curve], ("x", "y"), levels=[(5.0, "five")]).drawn("svg")
    level, line = figure.axes[0].lines
    assert set(level.get_ydata()) == {5.0}
    np.testing.assert_equal(np.array(line.get_ydata(), float), [10.0, np.nan, 30.0])
