"""``budgets.png``: accuracy, forgetting and worst client against epsilon."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from server.spending import extent
from simulations.budgets.results import Budgets, Mean, Point

PANELS: dict[str, Callable[[Point], Mean | None]] = {
    "average accuracy (%)": lambda p: p.average_accuracy,
    "forgetting (points)": lambda p: p.forgetting,
    "worst client (%)": lambda p: p.worst_client,
}
"""Panel to figure."""
INKS = ("#1f4e79", "#c0504d", "#4f8f4f", "#7f5f9f", "#b8860b", "#444444")


def draw(path: Path, budgets: Budgets) -> None:
    """Write a PNG: see :func:`figure_of`."""
    figure_of(budgets).savefig(path, dpi=110, format="png")


def figure_of(budgets: Budgets) -> Any:
    """Return means with 95 % intervals, lines at zero-shot and without privacy, and, where an audit
    was run, its lower bound beside what was claimed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    private = [point for point in budgets.points if point.epsilon != "inf"]
    audited = any(point.lower_bound is not None for point in private)
    count = len(PANELS) + audited
    figure = Figure(figsize=(4.4 * count, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    ticks = sorted({float(point.epsilon) for point in private})
    for number, (label, measure) in enumerate(PANELS.items()):
        panel = figure.add_subplot(1, count, number + 1)
        _methods(panel, budgets.points, measure)
        if number == 0 and budgets.points:
            _level(panel, budgets.points[0].zero_shot, "#888888", ":", "zero-shot")
        _dress(panel, label, ticks)
    if audited:
        panel = figure.add_subplot(1, count, count)
        _bounds(panel, private)
        _dress(panel, "epsilon shown by attack", ticks)
    figure.suptitle(_meaning(private), fontsize=9)
    return figure


def _bounds(panel: Any, private: list[Point]) -> None:
    """Equal for all methods: an audit has one of its own."""
    shown = {float(p.epsilon): p.lower_bound for p in private if p.lower_bound is not None}
    delta = max(p.lower_bound_delta or 0.0 for p in private)
    label = f"lower bound (95 %), delta = {delta:.2g}"
    panel.plot(list(shown), list(shown), "--", color="#888888", label="claimed")
    panel.plot(list(shown), list(shown.values()), "v", color=INKS[1], label=label)


def _meaning(private: list[Point]) -> str:
    """An epsilon is never without its delta, unit and extent."""
    deltas = [point.delta for point in private if point.delta is not None]
    if not deltas:
        return ""
    seeded = "; simulation only" if any(point.simulation_only for point in private) else ""
    over = extent(any(point.disjoint_tasks for point in private))
    return f"epsilon at delta <= {max(deltas):.2g} per {private[0].unit}, over {over}{seeded}"


def _methods(panel: Any, points: list[Point], measure: Callable[[Point], Mean | None]) -> None:
    """A curve and a level for each; curves stand a little aside of each other."""
    for k, method in enumerate(dict.fromkeys(point.method for point in points)):
        ink = INKS[k % len(INKS)]
        own = [(p.epsilon, m) for p in points if p.method == method and (m := measure(p))]
        private = [(float(epsilon), mean) for epsilon, mean in own if epsilon != "inf"]
        if private:
            xs = [epsilon * 1.03**k for epsilon, _ in private]
            ys = [100 * mean.mean for _, mean in private]
            errors = [100 * (mean.half_width or 0.0) for _, mean in private]
            panel.errorbar(xs, ys, errors, fmt="o-", color=ink, capsize=3, ms=4, label=method)
        for epsilon, mean in own:
            if epsilon == "inf":
                _level(panel, mean, ink, "--", f"{method}, no privacy")


def _level(panel: Any, found: Mean, ink: str, style: str, label: str) -> None:
    panel.axhline(100 * found.mean, color=ink, linestyle=style, linewidth=1, label=label)
    if found.half_width is not None:
        low, high = found.mean - found.half_width, found.mean + found.half_width
        panel.axhspan(100 * low, 100 * high, color=ink, alpha=0.08, linewidth=0)


def _dress(panel: Any, label: str, ticks: list[float]) -> None:
    panel.set(xscale="log", xlabel="epsilon", ylabel=label)
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.minorticks_off()
    panel.grid(visible=True, alpha=0.2)
    panel.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
