"""``budgets.png``: accuracy, forgetting and worst client against epsilon."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from server.spending import extent, rounded_up
from simulations.budgets.results import Budgets, Mean, Point

PANELS: dict[str, Callable[[Point], Mean | None]] = {
    "Average accuracy (%)": lambda p: p.average_accuracy,
    "Forgetting (points)": lambda p: p.forgetting,
    "Accuracy of the worst client (%)": lambda p: p.worst_client,
}
"""Title of a panel to its figure."""
BEYOND = 2.0
"""How far to the right of the largest budget 'no privacy' stands, as a factor."""
SLIDE = (13.33, 5.2)
"""Inches: three panels fit a slide of 16 to 9 with a title above."""
INKS = ("#1f4e79", "#c0504d", "#4f8f4f", "#7f5f9f", "#b8860b", "#444444")


def draw(path: Path, budgets: Budgets) -> None:
    """Write a PNG: see :func:`figure_of`."""
    figure_of(budgets).savefig(path, dpi=110, format="png")


def figure_of(budgets: Budgets) -> Any:
    """Return means with 95 % intervals over the budgets, without privacy at the right end (∞), a
    line at zero-shot, and, where an audit was run, its lower bound beside what was claimed."""
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
    for number, (label, measure) in enumerate(PANELS.items()):
        panel = figure.add_subplot(1, count, number + 1)
        _methods(panel, budgets.points, measure, end)
        if number == 0 and budgets.points:
            _level(panel, budgets.points[0].zero_shot, "#888888", ":", "zero-shot")
        _dress(panel, label, ticks, end if free else 0.0)
    if audited:
        panel = figure.add_subplot(1, count, count)
        _bounds(panel, private)
        _dress(panel, "Epsilon that an attack has shown", ticks, 0.0)
    figure.suptitle(f"{budgets.experiment}: what privacy costs\n{_meaning(private)}", fontsize=11)
    return figure


def _bounds(panel: Any, private: list[Point]) -> None:
    """Equal for all methods: an audit has one of its own."""
    shown = {float(p.epsilon): p.lower_bound for p in private if p.lower_bound is not None}
    delta = max(p.lower_bound_delta or 0.0 for p in private)
    label = f"lower bound (95 %), delta = {rounded_up(delta, 2)}"
    panel.plot(list(shown), list(shown), "--", color="#888888", label="claimed")
    panel.plot(list(shown), list(shown.values()), "v", color=INKS[1], label=label)


def _meaning(private: list[Point]) -> str:
    """An epsilon is never without its delta, unit and extent."""
    deltas = [point.delta for point in private if point.delta is not None]
    if not deltas:
        return ""
    seeded = "; simulation only" if any(point.simulation_only for point in private) else ""
    over = extent(any(point.disjoint_tasks for point in private))
    trust = dict.fromkeys(textwrap.fill(point.assumes, 110) for point in private if point.assumes)
    told = "".join(f"\n{text}" for text in trust)
    delta, unit = rounded_up(max(deltas), 2), private[0].unit
    return f"epsilon at delta <= {delta} per {unit}, over {over}{seeded}{told}"


def _methods(
    panel: Any, points: list[Point], measure: Callable[[Point], Mean | None], end: float
) -> None:
    """A curve for each, dotted on to the value without privacy at ``end``; curves stand a little
    aside of each other."""
    for k, method in enumerate(dict.fromkeys(point.method for point in points)):
        ink = INKS[k % len(INKS)]
        own = [(p.epsilon, m) for p in points if p.method == method and (m := measure(p))]
        private = [(float(epsilon), mean) for epsilon, mean in own if epsilon != "inf"]
        free = [(end, mean) for epsilon, mean in own if epsilon == "inf"]
        for some, style in ((private, "o-"), (free, "D")):
            xs = [epsilon * 1.03**k for epsilon, _ in some]
            ys = [100 * mean.mean for _, mean in some]
            errors = [100 * (mean.half_width or 0.0) for _, mean in some]
            label = method if style == "o-" or not private else None
            if some:
                panel.errorbar(xs, ys, errors, fmt=style, color=ink, capsize=3, ms=5, label=label)
        if private and free:
            last, (_, mean) = private[-1], free[0]
            xs = [last[0] * 1.03**k, end * 1.03**k]
            panel.plot(xs, [100 * last[1].mean, 100 * mean.mean], ":", color=ink, linewidth=1)


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
