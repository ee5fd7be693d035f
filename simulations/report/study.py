"""The pages of what was measured: of a study, with what a paper takes of it (figures of every cell
as CSV, the tables of the page as LaTeX, its drawings as SVG and PDF), and of audits."""

import csv
import io
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from deal_core.atomic_write import atomic_write
from simulations.audit import membership
from simulations.audit.command import EXPLANATION, Audit, attack_table, claims, meaning
from simulations.output import DASH, Table, read_stored, write_texts
from simulations.report import blocks as html
from simulations.study import tables
from simulations.study.grid import Study
from simulations.study.results import STUDY_JSON, CellResult, StudyResults
from simulations.study.statistics import estimate

AUDIT_JSON = "audit.json"
PAPER = "paper"
"""Folder of what a paper takes."""
TEX = {
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    **{"±": r"$\pm$", "–": "--", "×": r"$\times$", "≤": r"$\leq$", "<": "$<$", ">": "$>$"},
}
"""Marks of LaTeX, escaped."""


def study_page(folder: Path) -> html.Page:
    """Return the page of the study in a folder. UserError: its file cannot be read."""
    path = folder / STUDY_JSON
    results = read_stored(StudyResults, path, "figures of a study")
    study, cells = Study(results.study, path, results.file), results.standing
    complete = len(cells) == results.wanted
    seeds = ", ".join(map(str, sorted({cell.seed for cell in cells})))
    return html.Page(
        kind="Study",
        title=results.study,
        subtitle=results.description,
        sections=tuple(_study_sections(folder, study, results)),
        state="complete" if complete else f"{len(cells)} of {results.wanted} cells",
        tone="good" if complete else "warn",
        meta=(
            f"experiment {Path(results.file.experiment).stem}",
            f"{len({cell.arm for cell in cells})} arms",
            f"seeds {seeds or DASH}",
            *[f"{len({cell.order for cell in cells})} orders"] * bool(results.file.orders),
            *[f"{len({cell.setting for cell in cells})} settings"] * bool(results.file.settings),
        ),
        source=STUDY_JSON,
    )


def _study_sections(folder: Path, study: Study, results: StudyResults) -> Iterator[html.Section]:
    cells = results.standing
    yield html.Section("summary", "Summary", tuple(_summary(study, results)))
    if study.file.epsilons and cells:
        yield html.Section("budgets", "Accuracy against epsilon", tuple(_budgets(study, cells)))
    settings = [name for name in study.file.settings if any(c.setting == name for c in cells)]
    if len(settings) < 2 and cells:
        for name, blocks in _parts(study, cells).items():
            yield html.Section(name.lower(), name, tuple(blocks))
    elif cells:
        yield html.Section("settings", "Settings", tables.setting_tables(study, cells))
        for name in settings:
            parts = _parts(study, [cell for cell in cells if cell.setting == name])
            told = [block for part, own in parts.items() for block in (html.Heading(part), *own)]
            yield html.Section(f"setting-{name}", f"Setting {name}", tuple(told))
    gone = {cell.name for cell in results.cells} - {cell.name for cell in cells}
    runs = [page.relative_to(folder) for page in sorted(folder.glob("cells/**/report.html"))]
    links = [("/".join(run.parts[1:-1]), str(run)) for run in runs if run.parts[1] not in gone]
    if links:
        yield html.Section("runs", "Runs", (html.Bullets(tuple(links)),))


def _summary(study: Study, results: StudyResults) -> Iterator[html.Block]:
    missing = results.wanted - len(results.standing)
    if missing > 0:
        yield html.Text(
            f"{missing} of {results.wanted} cells have not finished, and are not on this page. The "
            "same command continues them.",
            "warn",
        )
    yield html.Text(tables.EXPLANATION)
    if tables.CLASS_IL in tables.measures_of(results.standing):
        yield html.Text(tables.CLASS_IL_EXPLAINED)
    if texts := tables.mixed_measures(results.standing):
        yield html.Text(texts)
    if study.file.candidate:
        yield html.Text(
            f"The candidate, which is judged, is {study.label(study.file.candidate)}; it is never "
            "itself the best baseline."
        )


def _parts(study: Study, cells: Sequence[CellResult]) -> dict[str, list[html.Block]]:
    known = [
        name for name in (tables.TASK_IL, tables.CLASS_IL) if name in tables.measures_of(cells)
    ]
    arms: list[html.Block] = [_arms_drawing(study, cells, name) for name in known]
    arms += [tables.arms_table(study, cells), *map(html.Text, tables.on_all_tests(study, cells))]
    if tables.CLASS_IL in known:
        arms.append(tables.class_il_table(study, cells))
    told = [part for name in known for part in tables.significance(study, cells, name)]
    return {
        "Arms": arms,
        "Differences": [html.Text(part) if isinstance(part, str) else part for part in told],
        "Forgetting": list(_forgetting(study, cells)),
        "Cost": [tables.cost_table(study, cells)],
    }


def _arms_drawing(study: Study, cells: Sequence[CellResult], measure: str) -> html.Drawing:
    rows = []
    for arm, own in tables.by_arm(study, cells).items():
        known = [v for c in own if (v := tables.MEASURES[measure](c.outcome)) is not None]
        if known:
            found, marked = estimate(known), arm == study.file.candidate
            width = None if found.half_width is None else 100 * found.half_width
            hollow = not study.file.arms[arm].contestant
            rows.append(html.Dot(study.label(arm), 100 * found.mean, width, marked, hollow))
    return html.dots(
        f"{measure} of every arm, mean and 95 % interval. Hollow: bounds and "
        f"references.{' Orange: the candidate.' * bool(study.file.candidate)}",
        rows,
        "accuracy (%)",
        (100 * fmean(tables.zero_shots(cells)), "zero-shot") if measure == tables.TASK_IL else None,
    )


def _forgetting(study: Study, cells: Sequence[CellResult]) -> Iterator[html.Block]:
    table = tables.age_table(study, cells)
    if table is None:
        yield html.Text("No arm has learnt one task after another.")
        return
    contestants = {study.label(arm) for arm, own in study.file.arms.items() if own.contestant}
    if len(table.columns) > 2:
        ages = range(len(table.columns) - 1)
        curves = [
            html.Curve(label, ages, [None if cell == DASH else float(cell) for cell in shares])
            for label, *shares in table.rows
            if label in contestants
        ]
        axes = ("tasks learnt since", "accuracy (%)")
        yield html.lines(f"{table.caption}: contestants, means over tasks and cells", curves, axes)
    yield table


def _budgets(study: Study, cells: Sequence[CellResult]) -> Iterator[html.Block]:
    if any(cell.privacy and cell.privacy.simulation_only for cell in cells):
        text = "Simulation only: the noise came from a seed, so nothing is guaranteed."
        yield html.Text(text, "warn")
    yield html.Text(tables.BUDGETS_EXPLAINED)
    arms = tables.by_arm(study, cells)
    for measure in tables.BUDGET_MEASURES:
        name = f"{measure} ({'points' if measure == 'forgetting' else '%'})"
        curves, levels = [], []
        for arm, own in arms.items():
            label, found = study.label(arm), {}
            for epsilon, under in tables.by_epsilon(study, own).items():
                known = [v for c in under if (v := tables.MEASURES[measure](c.outcome)) is not None]
                if known:
                    found[epsilon] = estimate(known)
            if math.inf in found:
                levels.append((100 * found.pop(math.inf).mean, f"{label}, no privacy"))
            if found:
                means = [100 * each.mean for each in found.values()]
                widths = [100 * (each.half_width or 0.0) for each in found.values()]
                curves.append(html.Curve(label, list(found), means, widths))
        if curves or levels:
            caption = f"{name[0].upper()}{name[1:]} against epsilon, means with 95 % intervals."
            yield html.lines(caption, curves, ("epsilon", name), levels=levels, budgets=True)
    for arm, own in arms.items():
        yield tables.budget_table(study, arm, own)
        yield from map(html.Text, tables.meanings(own))
    yield html.Text(tables.sweep_text(cells))


def write_paper(folder: Path, page: html.Page) -> None:
    """Write the files into ``paper/`` of a study's folder.

    Raises:
        UserError: the figures cannot be read, or the folder not written.
    """
    results = read_stored(StudyResults, folder / STUDY_JSON, "figures of a study")
    out, texts = folder / PAPER, {"cells.csv": cells_csv(results.standing)}
    drawings: dict[str, html.Drawing] = {}
    for section in page.sections:
        beside = f"{section.name}-" if section.name.startswith("setting-") else ""
        for block in section.blocks:
            if isinstance(block, Table):
                texts[f"{beside}{file_name(block.caption)}.tex"] = latex(block)
            elif isinstance(block, html.Drawing):
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
    table = csv.writer(text, lineterminator="\n")
    named = ("arm", "order", "setting", "seed")
    more = ("zero-shot", "epsilon", "seconds", "bytes up", "bytes down")
    table.writerow([*named, *tables.MEASURES, *more])
    for cell in cells:
        found = cell.outcome
        spent = max(cell.privacy.epsilon.values(), default=None) if cell.privacy else None
        measures = (measure(found) for measure in tables.MEASURES.values())
        costs = (found.seconds, found.bytes_up, found.bytes_down)
        start = fmean(found.zero_shot.values())
        table.writerow([*(getattr(cell, name) for name in named), *measures, start, spent, *costs])
    return text.getvalue()


def latex(table: Table) -> str:
    """Return a table to be put into a LaTeX document as it is."""
    sides = "".join("r" if table.is_number(x) else "l" for x in range(len(table.columns)))
    rows = [
        [rf"\textbf{{{tex(cell)}}}" if (y, x) in table.best else tex(cell) for x, cell in own]
        for y, own in enumerate(map(enumerate, table.rows))
    ]
    head, *body = (" & ".join(cells) + r" \\" for cells in [[*map(tex, table.columns)], *rows])
    parts = [f"% {table.caption}", rf"\begin{{tabular}}{{{sides}}}", r"\toprule", head]
    return "\n".join([*parts, r"\midrule", *body, r"\bottomrule", r"\end{tabular}", ""])


def tex(text: str) -> str:
    """Return a text with the marks of LaTeX escaped."""
    return "".join(TEX.get(letter, letter) for letter in text)


def audit_page(folder: Path) -> html.Page:
    """Return the page of the audit of budgets in a folder. UserError: it cannot be read."""
    audit = read_stored(Audit, folder / AUDIT_JSON, "audit")
    refuted = any(cell.refuted for cell in audit.cells)
    trainings = sum(len(cell.trainings) for cell in audit.cells)
    reading = html.Text(EXPLANATION), html.Text(meaning(audit.cells[0].trainings[0]))
    return html.Page(
        kind="Audit",
        title=audit.experiment,
        subtitle="Attacks on what is promised: what they have shown",
        sections=(
            html.Section("summary", "What the attacks have shown", tuple(_audit_summary(audit))),
            html.Section("reading", "How to read it", reading),
        ),
        state="a claim is refuted" if refuted else "no claim is refuted",
        tone="bad" if refuted else "good",
        meta=(f"{len(audit.cells)} budgets", f"{trainings} trainings"),
        source=AUDIT_JSON,
    )


def _audit_summary(audit: Audit) -> Iterator[html.Block]:
    refuted = sum(cell.refuted for cell in audit.cells)
    if refuted:
        yield html.Text(
            f"{refuted} attacks refute what the ledger claims: the mechanism protects less.", "bad"
        )
    else:
        yield html.Text("No attack refutes a claim. That is no proof: a better one might.", "good")
    first = audit.cells[0].trainings[0]
    if first.simulation_only:
        yield html.Text("Simulation only: the noise came from a seed.", "warn")
    yield html.Text(claims(first))
    yield attack_table(audit)


def membership_page(folder: Path) -> html.Page:
    """Return the page of the audit of membership in a folder. UserError: it cannot be read."""
    audit = read_stored(membership.MembershipAudit, folder / membership.FILE, "audit of membership")
    told = membership.told_table(audit.told), html.Text(membership.EXPLANATION)
    return html.Page(
        kind="Audit",
        title=audit.experiment,
        subtitle="Who is in what leaves the sites, as far as attacks tell",
        sections=(html.Section("membership", "Membership inference", told),),
        meta=(f"{audit.directions} directions",),
        source=membership.FILE,
    )
