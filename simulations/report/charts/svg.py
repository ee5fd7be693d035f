"""Inline SVG whose colours follow the page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, RULE, PAPER = "#010101", "#010102", "#010103", "#010104"
SERIES = ("#010200", "#010201", "#010202", "#010203", "#010204", "#010205")
"""Colours that people who are colour-blind can tell apart; lines differ in their dashes, too."""
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (3, 1)), (0, (8, 3)))
"""Of the lines of each colour."""

VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    RULE: "rule",
    PAPER: "paper",
    **{colour: f"series-{i}" for i, colour in enumerate(SERIES)},
}
"""Placeholder to the variable of the style sheet."""

FONT = 11.0
"""Points; a drawing of half the page's width is shown at about its own size."""
HALF, WIDE = 430.0, 860.0
"""Widths of drawings, in points."""

SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a name may have a dollar sign
    "font.size": FONT,
    "axes.labelsize": FONT,
    "axes.titlesize": FONT,
    "axes.titlelocation": "left",
    "axes.titlepad": 5,
    "xtick.labelsize": FONT,
    "ytick.labelsize": FONT,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": FONT,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
"""Of matplotlib."""


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
