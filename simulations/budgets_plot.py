"""``budgets.png``: accuracy, forgetting and worst client against epsilon."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from simulations.budgets_results import Budgets, Mean, Point

PANELS: dict[str, Callable[[Point], Mean | None]] = {
    "average accuracy (%)": lambda p: p.average_accuracy,
    "forgetting (points)": lambda p: p.forgetting,
    "worst client (%)": lambda p: p.worst_client,
}
"""Panel to figure."""
INKS = ("#1f4e79", "#c0504d", "#4f8f4f", "#7f5f9f", "#b8860b", "#444444")


def draw(path: Path, budgets: Budgets) -> None:
    """Write a PNG: means with 95 % intervals, lines at zero-shot and without privacy, and, where
    an audit was run, its lower bound beside what was claimed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    audited = [p for p in _private(budgets.points) if p.lower_bound is not None]
    count = len(PANELS) + bool(audited)
    figure = Figure(figsize=(4.4 * count, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    methods = list(dict.fromkeys(point.method for point in budgets.points))
    for number, (label, measure) in enumerate(PANELS.items()):
        panel = figure.add_subplot(1, count, number + 1)
        for k, method in enumerate(methods):
            points = [p for p in budgets.points if p.method == method]
            _curve(panel, method, points, measure, INKS[k % len(INKS)])
        if number == 0 and budgets.points:
            _level(panel, budgets.points[0].zero_shot, "#888888", ":", "zero-shot")
        _dress(panel, label)
    if audited:
        panel = figure.add_subplot(1, count, count)
        claims, bounds = zip(*((float(p.epsilon), p.lower_bound) for p in audited), strict=True)
        panel.plot(claims, claims, color="#888888", linestyle="--", label="claimed")
        panel.plot(claims, bounds, "v", color=INKS[1], label="lower bound (audit)")
        _dress(panel, "epsilon shown by attack")
    figure.savefig(path, dpi=110)


def _curve(
    panel: Any, method: str, points: list[Point], measure: Callable[[Point], Mean | None], ink: str
) -> None:
    known = [(float(p.epsilon), m) for p in _private(points) if (m := measure(p)) is not None]
    if known:
        xs = [x for x, _ in known]
        ys = [100 * m.mean for _, m in known]
        errors = [100 * (m.half_width or 0.0) for _, m in known]
        panel.errorbar(xs, ys, errors, fmt="o-", color=ink, capsize=3, markersize=4, label=method)
    for point in points:
        if point.epsilon == "inf":
            _level(panel, measure(point), ink, "--", f"{method}, no privacy")


def _level(panel: Any, found: Mean | None, ink: str, style: str, label: str) -> None:
    if found is None:
        return
    panel.axhline(100 * found.mean, color=ink, linestyle=style, linewidth=1, label=label)
    if found.half_width is not None:
        low, high = found.mean - found.half_width, found.mean + found.half_width
        panel.axhspan(100 * low, 100 * high, color=ink, alpha=0.08, linewidth=0)


def _private(points: list[Point]) -> list[Point]:
    return [point for point in points if point.epsilon != "inf"]


def _dress(panel: Any, label: str) -> None:
    panel.set(xscale="log", xlabel="epsilon", ylabel=label)
    panel.xaxis.set_major_formatter("{x:g}")
    panel.grid(visible=True, alpha=0.2)
    panel.legend(fontsize=7)
