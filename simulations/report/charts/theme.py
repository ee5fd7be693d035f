"""Colours and sizes of all drawings. A colour is a placeholder for a variable of the style sheet,
so that a drawing is right on light and dark paper."""

from __future__ import annotations

from typing import Any

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
