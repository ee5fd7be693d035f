"""What a page is made of: blocks, figures as they are shown, and one HTML file of them."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from server.results import rounded_up
from simulations.output import DASH, Table, duration, signed

HERE = Path(__file__).parent
Tone = Literal["", "good", "warn", "bad"]


def percent(share: float | None) -> str:
    """Return a share of 0 to 1 in per cent, without the sign; a dash where there is none."""
    return DASH if share is None else f"{100 * share:.1f}"


def points(difference: float | None) -> str:
    """Return a difference of shares in points, with its sign."""
    return DASH if difference is None else signed(difference)


def whole(count: float | None) -> str:
    """Return a count."""
    return DASH if count is None else f"{count:,.0f}".replace(",", " ")


def decimal(value: float | None, digits: int = 3) -> str:
    """Return a figure to so many significant digits."""
    return DASH if value is None else f"{value:.{digits}g}"


def at_most(value: float | None, digits: int = 3) -> str:
    """Return a bound to so many significant digits, never a smaller one: an epsilon, a delta."""
    return DASH if value is None else rounded_up(value, digits)


def time(seconds: float | None) -> str:
    """Return seconds as a time for people; below ten with a digit after the point."""
    if seconds is None:
        return DASH
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)


@dataclass(frozen=True)
class Drawing:
    """A drawing; a table on the page has its figures."""

    caption: str
    drawn: Callable[[str], bytes]
    """Its file in a format, ``svg`` or ``pdf``."""

    @property
    def address(self) -> str:
        """Return an address that holds the drawing whole."""
        return f"data:image/svg+xml;base64,{b64encode(self.drawn('svg')).decode()}"


@dataclass(frozen=True)
class Tiles:
    """Headline measures: name, value, and a note of a few words."""

    tiles: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Facts:
    """Names and what is known of them."""

    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Text:
    """A paragraph; with a tone it is set off from the others."""

    text: str
    tone: Tone = ""


@dataclass(frozen=True)
class Heading:
    """A title within a section."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of short sentences, or of links: what is shown, and its address relative to the page
    (empty: none)."""

    items: tuple[tuple[str, str], ...]


Block = Table | Drawing | Tiles | Facts | Text | Heading | Bullets


@dataclass(frozen=True)
class Section:
    """A part of a page; ``name`` is the anchor of its title."""

    name: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """A whole page."""

    kind: str
    """Of what it is a report, e.g. ``Run``."""
    title: str
    subtitle: str
    """One sentence; empty: none."""
    sections: tuple[Section, ...]
    state: str = ""
    """``finished``, ``stopped``, ...; empty: it has none."""
    tone: Tone = "good"
    """Of the state."""
    meta: tuple[str, ...] = ()
    """Short facts below the title."""
    source: str = ""
    """Name of the file that the page is made from; empty: none."""


def render(page: Page) -> str:
    """Return the HTML. Everything is escaped, and a name that is missing is an error."""
    jinja = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters["kind"] = lambda block: type(block).__name__
    style = Markup((HERE / "style.css").read_text(encoding="utf-8"))
    return jinja.get_template("page.html").render(page=page, style=style)
