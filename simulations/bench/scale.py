"""``deal bench scale``: what a round costs as one thing grows, with fitted exponents and a plot."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deal_core.config.home import at_home
from deal_core.errors import UserError
from simulations.bench.figures import figures_to
from simulations.bench.peak_memory import run_watched
from simulations.bench.scale_axes import Axis, Run
from simulations.bench.scale_data import write_stream
from simulations.bench.scale_fit import Point, exponent

ROUNDS = 3


def bench(axes: Sequence[Axis], console: Console, out: str = "") -> None:
    """Measure axis by axis, print each table as it is done; with ``out``, a folder, write the
    figures and the plot there.

    Raises:
        UserError: ``out`` is no folder and cannot be made one; nothing was measured.
    """
    folder = _made(at_home(out)) if out else None
    write = figures_to(str(folder / "scale.json") if folder is not None else "")
    done: list[tuple[Axis, list[Point]]] = []
    for axis in axes:
        points = [point for run in axis.runs for point in measured(run)]
        done.append((axis, points))
        console.print(table(axis, points))
        write({"axes": [as_json(*each) for each in done]})
    if folder is not None:
        from simulations.bench.scale_plot import draw

        draw(folder / "scale.png", done)


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"--out {folder}: is a file; name a folder") from None
    except OSError as error:
        raise UserError(
            f"--out {folder}: cannot be made ({error.strerror}); name another folder"
        ) from None
    return folder


def measured(run: Run) -> Iterator[Point]:
    """Run one experiment in a process of its own, on one worker with one thread."""
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "data", Path(folder) / "run"
        write_stream(data, run.stream)
        settings = {
            "data.source": "files",
            "data.path": data,
            "data.partition.kind": "iid",
            "federation.rounds": ROUNDS if run.x is not None else 2,
            "run.workers": 1,
            "run.threads": 1,
            **run.settings,
        }
        command = [sys.executable, "-P", "-m", "simulations.cli", "simulate", "quickstart"]
        for key, value in settings.items():
            command += ["--set", f"{key}={value}"]
        began = time.time()
        peak = run_watched([*command, "--out", str(out)], Path(folder) / "log")
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        events = [json.loads(line) for line in lines]
        start = next(e["time"] for e in events if e["event"] == "round_started") - began
        yield from points(run, events, start, peak)


def points(run: Run, events: Sequence[dict[str, Any]], start: float, peak: int) -> Iterator[Point]:
    """Yield one point for the run; where tasks grow, one for each task but the first (which has
    nothing to keep)."""
    rounds = [event for event in events if event["event"] == "round_finished"]
    if run.x is not None:
        yield _point(run.x, [e["seconds"] for e in rounds[1:]], start, peak)
        return
    for stage in sorted({event["stage"] for event in rounds} - {0}):  # of one task each
        seconds = [e["seconds"] for e in rounds if e["stage"] == stage]
        yield _point(stage, seconds, start, peak)


def _point(x: float, seconds: Sequence[float], start: float, peak: int) -> Point:
    return Point(x, statistics.median(seconds), min(seconds), max(seconds), start, peak)


def as_json(axis: Axis, points: Sequence[Point]) -> dict[str, Any]:
    """The figures of an axis."""
    return {
        "axis": axis.name,
        "unit": axis.unit,
        "exponent": exponent(points),
        "expected": axis.expected,
        "points": [asdict(point) for point in points],
    }


def table(axis: Axis, points: Sequence[Point]) -> Table:
    """One line a point; of many, every tenth."""
    drawn = Table(
        title=f"{axis.name}: exponent {exponent(points):.2f} (expected {axis.expected})",
        caption="start: from the start of the process to the first round",
    )
    for name in (axis.unit, "s a round", "smallest", "largest", "start s", "peak MB"):
        drawn.add_column(name, justify="right")
    shown = points if len(points) < 20 else [*points[::10], points[-1]]
    for point in shown:
        drawn.add_row(
            f"{point.x:g}",
            f"{point.seconds:.3f}",
            f"{point.least:.3f}",
            f"{point.most:.3f}",
            f"{point.start_seconds:.1f}",
            f"{point.peak_bytes / 1e6:.0f}",
        )
    return drawn
