"""Pages in a real browser: no error, no request, no horizontal scrolling; and axe, where it is.

``CHROMIUM`` names a browser that is not in the path; ``AXE`` the ``axe.min.js`` of the npm package
``axe-core``.
"""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from simulations.report.command import report_comparison, report_privacy, write_report
from tests.simulations.report.chromium import Tab, find_chromium, opened
from tests.stored_results import RESULTS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not find_chromium(), reason="no Chromium in the path, and CHROMIUM names none"
    ),
]

EXAMPLES = Path(__file__).parent / "examples"
FOLDERS = {
    "run": EXAMPLES / "plain",
    "private": EXAMPLES / "private",
    "deployment": EXAMPLES / "deployment",
    "study": RESULTS / "all-labels-medmcqa",
    "settings": RESULTS / "memory",
    "budgets": RESULTS / "budgets",
    "audit": RESULTS / "audit-private",
}
KINDS = [*FOLDERS, "comparison", "ledger"]
OPEN_ALL = "document.querySelectorAll('details').forEach(each => each.open = true)"
EVERYTHING = "[...document.querySelectorAll('body *')]"
WIDTHS = "[document.documentElement.scrollWidth, window.innerWidth]"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind to its page."""
    folder = tmp_path_factory.mktemp("pages")
    copies = {kind: Path(shutil.copytree(path, folder / kind)) for kind, path in FOLDERS.items()}
    made = {kind: write_report(copy) for kind, copy in copies.items()}
    quiet = Console(quiet=True)
    runs = [str(copies["run"]), str(copies["private"])]
    report_comparison(runs, str(folder), quiet)
    report_privacy(str(ledger_in(folder / "state")), "", False, quiet)
    return made | {
        "comparison": folder / "compare.html",
        "ledger": folder / "state" / "privacy.html",
    }


def ledger_in(folder: Path) -> Path:
    from deal_core.privacy.events import Budget, LedgerEvent
    from deal_core.privacy.ledger import Ledger

    place = ("a run", "surgery", "learn", 0, 1, "record", "record")
    event = LedgerEvent(*place, 0.1, 1.5, 10, 1.0, 1e-4, False)
    for number in range(3):
        Ledger(folder).charge(event, Budget(100.0, 1e-4), f"r{number}", b"x")
    return folder


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with opened(find_chromium(), tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1100])
@pytest.mark.parametrize("kind", KINDS)
def test_no_error_no_request_and_nothing_beyond_the_window(
    tab: Tab, pages: dict[str, Path], kind: str, width: int, scheme: str
) -> None:
    tab.window(width, scheme)
    tab.open(pages[kind])
    tab.evaluate(OPEN_ALL)
    across, window = tab.evaluate(WIDTHS)
    assert across <= window == width
    assert tab.faults == []
    assert set(tab.requests) <= {pages[kind].resolve().as_uri(), "data:,"}


@pytest.mark.parametrize("kind", KINDS)
def test_light_and_dark_differ_in_the_drawings_too(
    tab: Tab, pages: dict[str, Path], kind: str
) -> None:
    found = []
    for scheme in ("light", "dark"):
        tab.window(1100, scheme)
        tab.open(pages[kind])
        colours = tab.evaluate(
            "[document.body, ...document.querySelectorAll('svg text')].slice(0, 2).map(each => "
            "{ const style = getComputedStyle(each); "
            "return each === document.body ? style.backgroundColor : style.fill; })"
        )
        found.append(colours)
    assert all(one != other for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_it_prints_with_all_that_is_folded(tab: Tab, pages: dict[str, Path], kind: str) -> None:
    tab.window(1100, "dark")
    tab.open(pages[kind])
    pdf = base64.b64decode(tab.ask("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)["data"])
    assert pdf.startswith(b"%PDF")
    tab.ask("Emulation.setEmulatedMedia", media="print")
    shown = tab.evaluate(
        "[...document.querySelectorAll('details table')].map(each => each.offsetHeight > 0)"
    )
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    tab.ask("Emulation.setEmulatedMedia", media="")
    assert all(shown)
    assert paper == "rgb(255, 255, 255)"


@pytest.mark.parametrize("kind", KINDS)
def test_everything_can_be_reached_by_the_keyboard(
    tab: Tab, pages: dict[str, Path], kind: str
) -> None:
    """What scrolls or opens takes the focus, in the order of the page; the first is the link past
    the head of it."""
    tab.window(400)
    tab.open(pages[kind])
    expected = tab.evaluate(
        f"{EVERYTHING}.flatMap((e, place) => e.matches('a, summary, .scroll') && "
        "e.checkVisibility({contentVisibilityAuto: true}) && "
        "(!e.closest('details') || e.tagName === 'SUMMARY') ? [place] : [])"
    )
    reached: list[int] = []
    for _ in range(len(expected)):
        for form in ("keyDown", "keyUp"):
            tab.ask("Input.dispatchKeyEvent", type=form, key="Tab", code="Tab")
        reached.append(tab.evaluate(f"{EVERYTHING}.indexOf(document.activeElement)"))
    assert reached == expected
    assert tab.evaluate(f"{EVERYTHING}[{reached[0]}].className") == "skip"


@pytest.mark.skipif(
    not os.environ.get("AXE"), reason="AXE does not name axe.min.js (npm package axe-core)"
)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", KINDS)
def test_axe_finds_nothing(tab: Tab, pages: dict[str, Path], kind: str, scheme: str) -> None:
    tab.ask("Page.setBypassCSP", enabled=True)  # for axe; the page itself runs no script
    try:
        for width in (400, 1100):
            tab.window(width, scheme)
            tab.open(pages[kind])
            tab.evaluate(OPEN_ALL)
            tab.evaluate(Path(os.environ["AXE"]).read_text(encoding="utf-8") + "; null")
            found = tab.evaluate(
                "axe.run().then(all => all.violations.map(each => "
                "[each.impact, each.id, each.nodes[0].html.slice(0, 200)]))"
            )
            assert found == []
    finally:
        tab.ask("Page.setBypassCSP", enabled=False)
