"""A page as one HTML file: no script, and no reference to anything outside of it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from simulations.report.page.blocks import Number, Page

TEMPLATES = Path(__file__).parent


@cache
def environment() -> Environment:
    """Return the template engine: everything is escaped, and a name that is not there is an
    error."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.tests["number"] = lambda cell: isinstance(cell, Number)
    made.globals["style"] = Markup((TEMPLATES / "style.css").read_text(encoding="utf-8"))
    return made


def render(page: Page) -> str:
    """Return the HTML."""
    return environment().get_template("page.html").render(page=page)
