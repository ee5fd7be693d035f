"""The page of a budget study: accuracy against epsilon."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from simulations.budgets.results import Budgets, Mean, Point
from simulations.budgets.tables import (
    ALL_LABELS_EXPLAINED,
    EXPLANATION,
    bound_meaning,
    budget_table,
    spent_meaning,
    sweep_text,
)
from simulations.output.stored import read_stored
from simulations.report.charts.drawings import Axis, Curve, lines
from simulations.report.page.blocks import (
    Block,
    Figure,
    Figures,
    Notice,
    Page,
    Section,
    Table,
    Text,
    decimal,
    from_markdown,
)

FILE = "budgets.json"
PANELS: dict[str, Callable[[Point], Mean | None]] = {
    "average accuracy (%)": lambda p: p.average_accuracy,
    "accuracy among all labels (%)": lambda p: p.class_incremental,
    "forgetting (points)": lambda p: p.forgetting,
    "worst client (%)": lambda p: p.worst_client,
}


def read_budgets(folder: Path) -> Budgets:
    """Return the budget study in a folder.

    Raises:
        UserError: its file cannot be read.
    """
    return read_stored(Budgets, folder / FILE, "budget study")


def budgets_page(budgets: Budgets) -> Page:
    """Return the page."""
    complete = budgets.finished == budgets.wanted
    methods = list(dict.fromkeys(point.method for point in budgets.points))
    seeds = sorted({seed for point in budgets.points for seed in point.seeds})
    return Page(
        kind="Budgets",
        title=budgets.experiment,
        subtitle=f"Accuracy of {budgets.experiment} against the privacy budget",
        sections=tuple(_sections(budgets, methods)),
        state="complete" if complete else f"{budgets.finished} of {budgets.wanted} runs",
        tone="good" if complete else "warn",
        meta=(f"methods {', '.join(methods)}", f"seeds {', '.join(map(str, seeds))}"),
        source=FILE,
    )


def _sections(budgets: Budgets, methods: Sequence[str]) -> Iterator[Section]:
    yield Section("summary", "Accuracy against epsilon", tuple(_summary(budgets, methods)))
    known = any(point.class_incremental is not None for point in budgets.points)
    for number, method in enumerate(methods):
        points = [point for point in budgets.points if point.method == method]
        caption = f"{method} under each budget; accuracies in %"
        lines_of = budget_table(points, known)
        yield Section(f"method-{number}", f"Method {method}", from_markdown(lines_of, caption))
    yield Section("sweep", "The sweep itself", (Text(sweep_text(budgets.sweep)),))


def _summary(budgets: Budgets, methods: Sequence[str]) -> Iterator[Block]:
    points = budgets.points
    if budgets.finished < budgets.wanted:
        yield Notice(
            f"{budgets.wanted - budgets.finished} of {budgets.wanted} runs have not finished; the "
            "same command continues them."
        )
    if not points:
        yield Text("No run has finished.")
        return
    if any(point.simulation_only for point in points):
        yield Notice("Simulation only: the noise came from a seed, so nothing is guaranteed.")
    for text in dict.fromkeys(filter(None, map(spent_meaning, points))):
        yield Text(text)
    figures = [_panel(i, name, of, budgets, methods) for i, (name, of) in enumerate(PANELS.items())]
    figures.append(_audited(points))
    yield Figures(tuple(each for each in figures if each is not None))
    known = any(point.class_incremental is not None for point in points)
    yield Text(EXPLANATION + (ALL_LABELS_EXPLAINED if known else ""))


def _panel(
    number: int,
    name: str,
    measure: Callable[[Point], Mean | None],
    budgets: Budgets,
    methods: Sequence[str],
) -> Figure | None:
    """Return a measure against epsilon, a line for each method; None: nobody has the measure."""
    curves: list[Curve] = []
    levels: list[tuple[float, str]] = []
    rows: list[tuple[str, ...]] = []
    for method in methods:
        private: list[tuple[float, Mean]] = []
        for point in budgets.points:
            found = measure(point)
            if point.method != method or found is None:
                continue
            rows.append((method, point.epsilon, _text(found)))
            if math.isfinite(float(point.epsilon)):
                private.append((float(point.epsilon), found))
            else:
                levels.append((100 * found.mean, f"{method}, no privacy"))
        if private:
            curves.append(_curve(method, private))
    if not rows:
        return None
    places = sorted({x for curve in curves for x in curve.xs})
    ticks = tuple((x, f"{x:g}") for x in places)
    axis = Axis("epsilon", name, "x", ticks, tuple(levels), intervals=True)
    return Figure(
        f"{name[0].upper()}{name[1:]} against epsilon, means with 95 % intervals.",
        lines(f"budgets-{number}", f"{name} against epsilon", curves, axis),
        Table(name, ("method", "epsilon", "mean"), tuple(rows), words=(1,)),
    )


def _curve(method: str, private: Sequence[tuple[float, Mean]]) -> Curve:
    means = [100 * found.mean for _, found in private]
    widths = [100 * (found.half_width or 0.0) for _, found in private]
    return Curve(
        method,
        tuple(x for x, _ in private),
        tuple(means),
        tuple(mean - width for mean, width in zip(means, widths, strict=True)),
        tuple(mean + width for mean, width in zip(means, widths, strict=True)),
    )


def _text(found: Mean) -> str:
    width = "" if found.half_width is None else f" ± {100 * found.half_width:.1f}"
    return f"{100 * found.mean:.1f}{width}"


def _audited(points: Sequence[Point]) -> Figure | None:
    """Return what an attack has shown beside what was claimed; None: there was no audit. Equal for
    all methods: an audit has one of its own."""
    shown = {
        float(point.epsilon): point.lower_bound
        for point in points
        if point.lower_bound is not None and math.isfinite(float(point.epsilon))
    }
    if not shown:
        return None
    unit = next((point.unit for point in points if point.unit), "")
    meaning = next(text for point in points if (text := bound_meaning(point, unit or "")))
    xs = tuple(sorted(shown))
    axis = Axis("epsilon claimed", "epsilon", "x", tuple((x, f"{x:g}") for x in xs))
    return Figure(
        f"What the audit has shown, beside what was claimed. {meaning}",
        lines(
            "audited",
            "Lower bounds on epsilon beside the claims",
            [Curve("claimed", xs, xs), Curve("shown by attack", xs, tuple(shown[x] for x in xs))],
            axis,
        ),
        Table(
            "Claimed and shown",
            ("claimed", "shown"),
            tuple((f"{x:g}", decimal(shown[x])) for x in xs),
        ),
    )
