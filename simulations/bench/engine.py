"""``deal bench engine``: what a round costs besides training, and how much memory clients take."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from simulations.bench.figures import figures_to
from simulations.bench.peak_memory import run_watched

ENGINES = ("inprocess", "flower")


@dataclass(frozen=True)
class EngineCase:
    """One federation on one engine.

    Attributes:
        training: ``trivial`` (``size`` bytes there and back, nothing learnt) or ``real``
            (the embedded model and data).
        sampled: clients of a round.
        rounds: measured; the first one is told apart.
    """

    engine: str
    training: str
    clients: int
    sampled: int
    rounds: int
    size: int = 0


@dataclass(frozen=True)
class Row:
    """Seconds of every round, the part of them that clients spent training (None: trivial or
    side by side), and peak memory of all processes."""

    cell: EngineCase
    seconds: tuple[float, ...]
    training_share: float | None
    peak_bytes: int

    @property
    def steady(self) -> float:
        """Median of the rounds after the first."""
        return statistics.median(self.seconds[1:] or self.seconds)


@dataclass(frozen=True)
class Sizes:
    """What is measured: clients of trivial rounds, and (registered, sampled) of real ones."""

    trivial: tuple[int, ...] = (10, 100, 1000)
    real: tuple[tuple[int, int], ...] = ((10, 10), (100, 100))
    size: int = 1_000_000
    rounds: int = 4
    repeats: int = 2


QUICK = Sizes((3,), (), 100_000, 2, 1)


def cells(sizes: Sizes) -> Iterator[EngineCase]:
    """Pairs of engines, the small federations first."""
    for clients in sizes.trivial:
        for engine in ENGINES:
            yield EngineCase(engine, "trivial", clients, clients, sizes.rounds, sizes.size)
    for clients, sampled in sizes.real:
        for engine in ENGINES:
            yield EngineCase(engine, "real", clients, sampled, 2)


def bench(sizes: Sizes, console: Console, out: str = "") -> None:
    """Measure, print the table, and write all figures as JSON.

    Raises:
        UserError: ``out`` cannot be written; nothing was measured.
    """
    write = figures_to(out)
    rows: list[Row] = []
    for cell in cells(sizes):
        repeats = sizes.repeats if cell.training == "trivial" else 1
        rows += [measured(cell) for _ in range(repeats)]
        write({"rows": [as_json(row) for row in rows]})
    console.print(table(rows))
    console.print(
        "Seconds a round (median over rounds after the first, and over repeats). Memory: peak of "
        "all processes. Besides training: part of the rounds' time in which no client trains.",
        soft_wrap=True,
    )


def measured(cell: EngineCase) -> Row:
    """Run a cell in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        log, out = Path(folder) / "log", Path(folder) / "out"
        if cell.training == "trivial":
            numbers = (cell.clients, cell.size, cell.rounds)
            command = [sys.executable, "-P", "-m", "simulations.bench.engine_apps", cell.engine]
            peak = run_watched([*command, *map(str, numbers), str(out)], log)
            return Row(cell, tuple(json.loads(out.read_text())), None, peak)
        peak = run_watched(real_command(cell, out), log)
        seconds, share = of_events(out / "metrics.jsonl")
        return Row(cell, seconds, share, peak)


def real_command(cell: EngineCase, out: Path) -> list[str]:
    """One task of the embedded data, at least 8 questions a client, one worker."""
    settings = {
        "run.engine": cell.engine,
        "run.workers": 1,
        "federation.clients": cell.clients,
        "federation.clients_per_round": cell.sampled,
        "federation.rounds": cell.rounds,
        "data.partition.kind": "iid",
        "data.tasks": '["laboratory"]',
        "data.max_test": cell.clients if cell.clients < 300 else 300,
    }
    command = [sys.executable, "-P", "-m", "simulations.cli", "simulate", "quickstart"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    return [*command, "--out", str(out)]


def of_events(path: Path) -> tuple[tuple[float, ...], float]:
    """Seconds of each round, and the share of them that the clients were training."""
    events: list[Mapping[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    rounds = [event["seconds"] for event in events if event["event"] == "round_finished"]
    training = sum(event["seconds"] for event in events if event["event"] == "client_finished")
    return tuple(rounds), training / sum(rounds)


def as_json(row: Row) -> dict[str, Any]:
    """Flat."""
    return {
        **asdict(row.cell),
        "seconds": row.seconds,
        "training_share": row.training_share,
        "peak_bytes": row.peak_bytes,
    }


def table(rows: list[Row]) -> Table:
    """One line a federation, both engines side by side."""
    drawn = Table(title="A round on both engines")
    drawn.add_column("training")
    for name in ("clients", "sampled", "inprocess s", "flower s", "flower/inprocess"):
        drawn.add_column(name, justify="right")
    for name in ("first round", "inprocess MB", "flower MB", "besides training"):
        drawn.add_column(name, justify="right")
    for where in dict.fromkeys((r.cell.training, r.cell.clients, r.cell.sampled) for r in rows):
        ours, theirs = (
            [r for r in rows if (*_place(r), r.cell.engine) == (*where, engine)]
            for engine in ENGINES
        )
        if not ours or not theirs:
            continue
        ratios = sorted(b.steady / a.steady for a, b in zip(ours, theirs, strict=True))
        share = ours[0].training_share
        drawn.add_row(
            *map(str, where),
            f"{statistics.median(r.steady for r in ours):.3f}",
            f"{statistics.median(r.steady for r in theirs):.3f}",
            f"{statistics.median(ratios):.1f} ({ratios[0]:.1f}-{ratios[-1]:.1f})",
            f"{theirs[0].seconds[0] / ours[0].seconds[0]:.1f}",
            f"{max(r.peak_bytes for r in ours) / 1e6:.0f}",
            f"{max(r.peak_bytes for r in theirs) / 1e6:.0f}",
            "–" if share is None else f"{1 - share:.1%}",
        )
    return drawn


def _place(row: Row) -> tuple[str, int, int]:
    return row.cell.training, row.cell.clients, row.cell.sampled
