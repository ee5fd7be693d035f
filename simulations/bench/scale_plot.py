"""The plot of ``deal bench scale``: log-log, one panel an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from simulations.bench.scale_axes import Axis
from simulations.bench.scale_fit import Point, exponent

COLUMNS = 3
INK, FIT = "#1f4e79", "#c0504d"


def draw(path: Path, done: Sequence[tuple[Axis, Sequence[Point]]]) -> None:
    """Write a PNG: seconds a round with their range, and the fitted power."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    rows = math.ceil(len(done) / COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, 3.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (axis, points) in enumerate(done):
        panel = figure.add_subplot(rows, COLUMNS, number + 1)
        xs, ys = [p.x for p in points], [p.seconds for p in points]
        panel.vlines(xs, [p.least for p in points], [p.most for p in points], color=INK, alpha=0.4)
        panel.plot(xs, ys, "o", color=INK, markersize=4)
        power = exponent(points)
        if math.isfinite(power):
            middle = sum(math.log(y) - power * math.log(x) for x, y in zip(xs, ys, strict=True))
            factor = math.exp(middle / len(xs))
            panel.plot(xs, [factor * x**power for x in xs], color=FIT, linewidth=1)
        panel.set(xscale="log", yscale="log", xlabel=axis.unit, ylabel="seconds a round")
        panel.set_ylim(min(ys) / 3, max(ys) * 3)
        for side in (panel.xaxis, panel.yaxis):
            side.set_major_formatter(LogFormatter())
            side.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.4)))
        panel.set_title(f"{axis.name}: exponent {power:.2f}", fontsize=10)
        panel.grid(visible=True, which="both", alpha=0.2)
    figure.savefig(path, dpi=110)
