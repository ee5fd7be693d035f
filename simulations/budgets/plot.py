"""``budgets.png``: accuracy, forgetting and worst client against epsilon."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from server.results import extent, rounded_up
from simulations.budgets.curve_names import curve_names
from simulations.budgets.results import Budgets, Mean, Point

FORGETTING = "Forgetting (points)"
PANELS: dict[str, Callable[[Point], Mean | None]] = {
    "Average accuracy (%)": lambda p: p.average_accuracy,
    FORGETTING: lambda p: p.forgetting,
    "Accuracy of the worst client (%)": lambda p: p.worst_client,
}
"""Title of a panel to its figure."""
AT_LEAST = 1.0
"""Points that the panel of forgetting shows on both sides of 0: less would look like much."""
FREE = "without privacy"
BEYOND = 2.0
"""How far to the right of the largest budget 'no privacy' stands, as a factor."""
SLIDE = (13.33, 5.2)
"""Inches: three panels fit a slide of 16 to 9 with a title above."""
FREE_INK = "#222222"
INKS = ("#1f4e79", "#c0504d", "#4f8f4f", "#7f5f9f", "#b8860b", "#444444")


def draw(path: Path, budgets: Budgets) -> None:
    """Write a PNG: see :func:`figure_of`."""
    figure_of(budgets).savefig(path, dpi=110, format="png")


def figure_of(budgets: Budgets) -> Any:
    """Return means with 95 % intervals over the budgets, a line of what is reached without privacy,
    with its point at the right end (∞), a line at zero-shot, and, where an audit was run, its lower
    bound beside what was claimed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    private = [point for point in budgets.points if point.epsilon != "inf"]
    audited = any(point.lower_bound is not None for point in private)
    count = len(PANELS) + audited
    figure = Figure(figsize=SLIDE, layout="constrained")
    FigureCanvasAgg(figure)
    ticks = sorted({float(point.epsilon) for point in private})
    end = BEYOND * max(ticks, default=1.0)
    free = len(private) < len(budgets.points)
    names = curve_names(list(dict.fromkeys(point.method for point in budgets.points)))
    for number, (label, measure) in enumerate(PANELS.items()):
        panel = figure.add_subplot(1, count, number + 1)
        _methods(panel, private, names, measure)
        _without_privacy(panel, budgets.points, names, measure, end)
        if label == FORGETTING:
            low, high = panel.get_ylim()
            panel.set_ylim(min(low, -AT_LEAST), max(high, AT_LEAST))
        if number == 0 and budgets.points:
            _level(panel, budgets.points[0].zero_shot, "#888888", ":", "zero-shot")
        _dress(panel, label, ticks, end if free else 0.0)
    if audited:
        panel = figure.add_subplot(1, count, count)
        _bounds(panel, private)
        _dress(panel, "Epsilon that an attack has shown", ticks, 0.0)
    figure.suptitle(
        f"{budgets.experiment}: what privacy costs\n{_meaning(private, names)}", fontsize=11
    )
    return figure


def _bounds(panel: Any, private: list[Point]) -> None:
    """Equal for all methods: an audit has one of its own."""
    shown = {float(p.epsilon): p.lower_bound for p in private if p.lower_bound is not None}
    delta = max(p.lower_bound_delta or 0.0 for p in private)
    label = f"lower bound (95 %), delta = {rounded_up(delta, 2)}"
    panel.plot(list(shown), list(shown), "--", color="#888888", label="claimed")
    panel.plot(list(shown), list(shown.values()), "v", color=INKS[1], label=label)


def _meaning(private: list[Point], names: Mapping[str, str]) -> str:
    """An epsilon is never without its delta, unit and extent, nor without whom it counts on."""
    deltas = [point.delta for point in private if point.delta is not None]
    if not deltas:
        return ""
    seeded = "; simulation only" if any(point.simulation_only for point in private) else ""
    over = extent(any(point.disjoint_tasks for point in private))
    told = "".join(f"\n{textwrap.fill(text, 140)}" for text in _trust(private, names))
    delta, unit = rounded_up(max(deltas), 2), private[0].unit
    return f"epsilon at delta <= {delta} per {unit}, over {over}{seeded}{told}"


def _trust(private: list[Point], names: Mapping[str, str]) -> list[str]:
    """Whom an epsilon counts on, with the curves of which that is so, unless it is so of all."""
    curves: dict[str, list[str]] = {}
    for point in private:
        own = curves.setdefault(point.assumes, [])
        own += [names[point.method]] if names[point.method] not in own else []
    if len(curves) == 1:
        return [text for text in curves if text]
    return [f"{', '.join(own)}: {text}" for text, own in curves.items() if text]


def _methods(
    panel: Any,
    private: list[Point],
    names: Mapping[str, str],
    measure: Callable[[Point], Mean | None],
) -> None:
    """A curve for each; they stand a little aside of each other."""
    for k, (method, name) in enumerate(names.items()):
        own = [(p, mean) for p in private if p.method == method and (mean := measure(p))]
        xs = [float(point.epsilon) * 1.03**k for point, _ in own]
        if own:
            _points(panel, xs, [mean for _, mean in own], "o-", INKS[k % len(INKS)], name)


def _without_privacy(
    panel: Any,
    points: list[Point],
    names: Mapping[str, str],
    measure: Callable[[Point], Mean | None],
    end: float,
) -> None:
    """A line across, and its point at ``end``: one for all curves, if what they reach is the same;
    else each has its own, in its ink and with its name."""
    free = [point for point in points if point.epsilon == "inf"]
    same = len({_figures(point) for point in free}) == 1 and len(free) == len(names)
    for point in free[:1] if same else free:
        mean, k = measure(point), list(names).index(point.method)
        if mean is not None:
            ink = FREE_INK if same else INKS[k % len(INKS)]
            label = FREE if same else f"{names[point.method]}, {FREE}"
            panel.axhline(100 * mean.mean, color=ink, linestyle="--", linewidth=1, label=label)
            _points(panel, [end if same else end * 1.03**k], [mean], "D", ink)


def _figures(point: Point) -> tuple[float | None, ...]:
    """What the panels show of a point."""
    means = [measure(point) for measure in PANELS.values()]
    return tuple(None if mean is None else mean.mean for mean in means)


def _points(
    panel: Any, xs: list[float], means: list[Mean], style: str, ink: str, label: str | None = None
) -> None:
    ys = [100 * mean.mean for mean in means]
    errors = [100 * (mean.half_width or 0.0) for mean in means]
    panel.errorbar(xs, ys, errors, fmt=style, color=ink, capsize=3, ms=5, label=label)


def _level(panel: Any, found: Mean, ink: str, style: str, label: str) -> None:
    panel.axhline(100 * found.mean, color=ink, linestyle=style, linewidth=1, label=label)
    if found.half_width is not None:
        low, high = found.mean - found.half_width, found.mean + found.half_width
        panel.axhspan(100 * low, 100 * high, color=ink, alpha=0.08, linewidth=0)


def _dress(panel: Any, title: str, ticks: list[float], end: float) -> None:
    """Titles and ticks; at ``end``, unless it is 0, stands what was trained without privacy."""
    panel.set(xscale="log", xlabel="Privacy budget: epsilon")
    panel.set_title(title, fontsize=10)
    names = [f"{tick:g}" for tick in ticks]
    panel.set_xticks([*ticks, *([end] if end else [])], [*names, *(["∞"] if end else [])])
    panel.minorticks_off()
    panel.grid(visible=True, alpha=0.2)
    panel.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
