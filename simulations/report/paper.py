"""What a paper takes from a study: every cell's figures as CSV, the tables of its page as LaTeX
(booktabs, means with intervals, the best contestant in bold), its drawings as SVG and PDF."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from statistics import fmean

from deal_core.atomic_write import atomic_write
from simulations.output import Table, read_stored, write_texts
from simulations.report.blocks import Drawing, Page
from simulations.study.results import STUDY_JSON, CellResult, StudyResults
from simulations.study.tables import MEASURES

FOLDER = "paper"
TEX = {
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    **{"±": r"$\pm$", "–": "--", "×": r"$\times$", "≤": r"$\leq$", "<": "$<$", ">": "$>$"},
}


def write_paper(folder: Path, page: Page) -> None:
    """Write the files into ``paper/`` of a study's folder.

    Raises:
        UserError: the figures cannot be read, or the folder not written.
    """
    results = read_stored(StudyResults, folder / STUDY_JSON, "figures of a study")
    out, texts = folder / FOLDER, {"cells.csv": cells_csv(results.standing)}
    drawings: dict[str, Drawing] = {}
    for section in page.sections:
        beside = f"{section.name}-" if section.name.startswith("setting-") else ""
        for block in section.blocks:
            if isinstance(block, Table):
                texts[f"{beside}{file_name(block.caption)}.tex"] = latex(block)
            elif isinstance(block, Drawing):
                drawings[beside + file_name(block.caption)] = block
    write_texts(out, texts)
    for name, drawing in drawings.items():
        for form in ("svg", "pdf"):
            atomic_write(out / f"{name}.{form}", drawing.drawn(form))


def file_name(caption: str) -> str:
    """Return a caption up to its first mark as the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", re.split(r"[,;:(]", caption)[0].lower()).strip("-")


def cells_csv(cells: list[CellResult]) -> str:
    """Return a line for each cell: what it is, and its measures, 0 to 1, as they were found."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    named = ("arm", "order", "setting", "seed")
    more = ("zero-shot", "epsilon", "seconds", "bytes up", "bytes down")
    lines.writerow([*named, *MEASURES, *more])
    for cell in cells:
        found = cell.outcome
        spent = max(cell.privacy.epsilon.values(), default=None) if cell.privacy else None
        measures = (measure(found) for measure in MEASURES.values())
        costs = (found.seconds, found.bytes_up, found.bytes_down)
        start = fmean(found.zero_shot.values())
        lines.writerow([*(getattr(cell, name) for name in named), *measures, start, spent, *costs])
    return text.getvalue()


def latex(table: Table) -> str:
    """Return a table to be put into a LaTeX document as it is."""
    sides = "".join("r" if table.is_number(x) else "l" for x in range(len(table.columns)))
    rows = [
        [rf"\textbf{{{tex(cell)}}}" if (y, x) in table.best else tex(cell) for x, cell in own]
        for y, own in enumerate(map(enumerate, table.rows))
    ]
    head, *lines = (" & ".join(cells) + r" \\" for cells in [[*map(tex, table.columns)], *rows])
    parts = [f"% {table.caption}", rf"\begin{{tabular}}{{{sides}}}", r"\toprule", head]
    return "\n".join([*parts, r"\midrule", *lines, r"\bottomrule", r"\end{tabular}", ""])


def tex(text: str) -> str:
    """Return a text with the marks of LaTeX escaped."""
    return "".join(TEX.get(letter, letter) for letter in text)
