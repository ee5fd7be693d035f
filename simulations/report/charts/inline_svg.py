"""A matplotlib drawing as SVG that can stand in a page beside others."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

from simulations.report.charts.theme import SETTINGS, VARIABLES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SVG = "{http://www.w3.org/2000/svg}"
HREF = "{http://www.w3.org/1999/xlink}href"
FONT_FAMILY = re.compile(r"font-family:[^;]*;?\s*|font:\s*(?=[\d.]+px)")
REFERENCE = re.compile(r"#([\w.-]+)")
FORBIDDEN = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML has no way to write, such as those that ring a bell."""
COLOURS = re.compile("|".join(["#000000", *VARIABLES]))


def draw(name: str, alt: str, size: tuple[float, float], paint: Callable[[Figure], None]) -> Markup:
    """Return a drawing.

    Args:
        name: of the drawing, its own on its page.
        alt: what it shows, for those who do not see it.
        size: width and height, points.
        paint: draws on the figure, with the colours of the theme.

    Returns:
        An ``svg`` element: no reference to anything outside of it, colours as variables of the
        style sheet, text in the font of the page.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    written = io.StringIO()
    settings: Any = {**SETTINGS, "svg.hashsalt": name}
    with rc_context(settings), warnings.catch_warnings():
        # The page's font draws the text, not the one that it is measured with.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
        paint(figure)
        figure.savefig(written, format="svg", metadata={"Date": None})
    return _inline(written.getvalue(), name, alt)


def _inline(text: str, name: str, alt: str) -> Markup:
    text = FORBIDDEN.sub("", text)
    root = ElementTree.fromstring(text)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{SVG}metadata", f"{SVG}style"):
                parent.remove(child)
    referred = set(REFERENCE.findall(text))
    for element in root.iter():
        _clean(element, name, referred)
    view = root.attrib["viewBox"]
    root.attrib = {"viewBox": view, "role": "img", "aria-label": FORBIDDEN.sub("", alt)}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _clean(element: ElementTree.Element, name: str, referred: set[str]) -> None:
    """Plain names, identifiers of this drawing alone, colours of the page."""
    element.tag = element.tag.removeprefix(SVG)
    kept: dict[str, str] = {}
    for key, value in element.attrib.items():
        if key == "id":
            if value in referred:
                kept["id"] = f"{name}-{value}"
        elif key == HREF:
            kept["href"] = value.replace("#", f"#{name}-")
        elif key == "clip-path":
            kept[key] = value.replace("#", f"#{name}-")
        elif key == "style":
            kept[key] = COLOURS.sub(_variable, FONT_FAMILY.sub("", value))
        else:
            kept[key] = " ".join(value.split())
    element.attrib = kept
    for side in ("text", "tail"):
        if not (getattr(element, side) or "").strip():
            setattr(element, side, None)


def _variable(found: re.Match[str]) -> str:
    return f"var(--{VARIABLES.get(found[0], 'ink')})"
