"""``deal bench aggregation``: time and memory of every rule, next to Flower's FedAvg."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from deal_core.aggregation import AGGREGATION_RULES
from simulations.bench.figures import figures_to
from simulations.bench.measure import Measured, RuleCase, flower_peak, measure

LINEAR = ("fedit", "ffa")
"""Rules in constant memory; the others hold what is sent, and are measured to 100 clients."""
MOST_CLIENTS = 100
LAYERS = 12
"""Query and value of six blocks: at rank 16 and width 768 an adapter has 1.2 MB."""


@dataclass(frozen=True)
class Sizes:
    """All combinations of these are measured."""

    clients: tuple[int, ...] = (10, 100, 1000)
    ranks: tuple[int, ...] = (8, 16)
    widths: tuple[int, ...] = (384, 768)


QUICK = Sizes((10,), (8,), (384,))


@dataclass(frozen=True)
class Row:
    """One line of the result; ratios are rule over Flower, peaks above a round of one client."""

    cell: RuleCase
    measured: Measured
    flower_peak_bytes: int | None

    @property
    def ratio(self) -> float:
        """Time of the rule over Flower's, both from decoded arrays."""
        return self.measured.times.rule / self.measured.times.flower

    @property
    def ratio_checked(self) -> float:
        """Time with checks over time without, both from bytes."""
        return self.measured.times.checked / self.measured.times.decoded

    def as_json(self) -> dict[str, Any]:
        """Flat, with ratios; seconds and bytes."""
        return {
            **asdict(self.cell),
            **{f"seconds_{k}": v for k, v in asdict(self.measured.times).items() if k != "passes"},
            "passes": self.measured.times.passes,
            "ratio": self.ratio,
            "ratio_checked": self.ratio_checked,
            "client_bytes": self.measured.client_bytes,
            "peak_bytes": self.measured.peak_bytes,
            "flower_peak_bytes": self.flower_peak_bytes,
        }


def bench(sizes: Sizes, console: Console, out: str = "") -> None:
    """Measure, print the table and, with ``out``, write it as JSON.

    Raises:
        UserError: ``out`` cannot be written; nothing was measured.
    """
    write = figures_to(out)
    work = cells(sizes)
    title = "measuring"
    rows = list(track(rows_of(work), title, len(work), console=Console(stderr=True)))
    console.print(table(rows))
    console.print(
        "Seconds a round, one thread. From bytes: with decoding and checks (Flower: decoding). "
        "MB: peak memory above a round of one client. n: passes behind each median.",
        soft_wrap=True,
    )
    write({"rows": [row.as_json() for row in rows]})


def cells(sizes: Sizes) -> list[RuleCase]:
    """Every rule in every size it is measured in, the small ones first."""
    return [
        RuleCase(rule, clients, rank, width, LAYERS)
        for width in sizes.widths
        for rank in sizes.ranks
        for clients in sizes.clients
        for rule in AGGREGATION_RULES
        if rule in LINEAR or clients <= MOST_CLIENTS
    ]


def rows_of(work: Sequence[RuleCase]) -> Iterator[Row]:
    """Measure one cell after the other; what Flower holds depends on sizes alone."""
    peaks: dict[tuple[int, int], int | None] = {}
    for cell in work:
        measured = alone(measure, cell)
        sent = measured.client_bytes, cell.clients
        if sent not in peaks:
            peaks[sent] = alone(flower_peak, cell)
        yield Row(cell, measured, peaks[sent])


def alone(function: Callable[[RuleCase], Any], cell: RuleCase) -> Any:
    """Call it in a process that has done nothing else: peaks of memory do not go down again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["simulations.bench.measure"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, cell).result()


def table(rows: Sequence[Row]) -> Table:
    """One line a cell."""
    drawn = Table(title="Aggregation beside Flower's FedAvg on the same arrays")
    for name in ("rule", "clients", "rank", "width", "MB sent"):
        drawn.add_column(name, justify="left" if name == "rule" else "right")
    for name in ("from arrays: s", "Flower s", "ratio", "from bytes: s", "Flower s", "ratio"):
        drawn.add_column(name, justify="right")
    for name in ("MB", "Flower MB", "n"):
        drawn.add_column(name, justify="right")
    for row in rows:
        cell, times = row.cell, row.measured.times
        drawn.add_row(
            *(cell.rule, str(cell.clients), str(cell.rank), str(cell.width)),
            f"{row.measured.client_bytes / 1e6:.2f}",
            *(f"{times.rule:.4f}", f"{times.flower:.4f}", f"{row.ratio:.2f}"),
            *(f"{times.checked:.4f}", f"{times.decoded:.4f}", f"{row.ratio_checked:.2f}"),
            *(_megabytes(row.measured.peak_bytes), _megabytes(row.flower_peak_bytes)),
            str(times.passes),
        )
    return drawn


def _megabytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e6:.1f}"
