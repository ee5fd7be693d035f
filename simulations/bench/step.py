"""``deal bench step``: the local step beside the Hugging Face Trainer, Opacus and the machine."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from simulations.bench.figures import figures_to
from simulations.bench.paired import Contestant, Timed, ratios, timed_in_turn
from simulations.bench.workloads import Workload

PLAIN, PRIVATE = ("float32", "bfloat16"), "private"
WINDOWS = 3
REFERENCE = "trainer float32"
PRIVATE_REFERENCE = "opacus float32"

WORKLOADS = (
    Workload(0, 16, 512, windows=WINDOWS + 1),
    Workload(32, 16, 256),
    Workload(64, 16, 128),
    Workload(128, 16, 64),
    Workload(256, 16, 32),
    Workload(128, 32, 64),
)
QUICK = (Workload(32, 4, 8),)


@dataclass(frozen=True)
class Line:
    """One contestant on one workload; ratios are pair by pair over the windows.

    Attributes:
        against: rate over that of the reference: (smallest, median, largest).
        limit_share: of the arithmetic limit in float32; None for texts of mixed length.
        memory: peak over the reference's.
    """

    workload: Workload
    timed: Timed
    reference: str
    against: tuple[float, float, float]
    limit_share: float | None
    memory: float | None

    def as_json(self) -> dict[str, Any]:
        """Flat."""
        return {
            "tokens": self.workload.tokens,
            "batch_size": self.workload.batch_size,
            "contestant": self.timed.name,
            "examples_per_second": self.timed.rates,
            "reference": self.reference,
            "ratio": self.against,
            "float32_limit_share": self.limit_share,
            "peak_bytes": self.timed.peak_bytes,
            "peak_ratio": self.memory,
            **self.timed.report,
        }


def contestants(workload: Workload) -> list[Contestant]:
    """All that are compared on a workload."""
    from simulations.bench.limit import product_work
    from simulations.bench.step_deal import deal_work
    from simulations.bench.step_trainer import opacus_work, trainer_work

    found = [Contestant(f"products {PLAIN[0]}", product_work, (PLAIN[0],))]
    for precision in PLAIN:
        found.append(Contestant(f"deal {precision}", deal_work, (workload, precision)))
        found.append(Contestant(f"trainer {precision}", trainer_work, (workload, precision)))
    if not workload.tokens:
        grouped = (workload, PLAIN[0], "group_by_length")
        found.append(Contestant(f"trainer {PLAIN[0]}, grouped", trainer_work, grouped))
    for precision in PLAIN:
        private = (workload, precision, True)
        found.append(Contestant(f"deal {precision}, {PRIVATE}", deal_work, private))
    found.append(Contestant(PRIVATE_REFERENCE, opacus_work, (workload,)))
    return found


def bench(workloads: Sequence[Workload], console: Console, out: str = "") -> None:
    """Measure workload by workload, print each table as it is done, write all as JSON.

    Raises:
        UserError: ``out`` cannot be written; nothing was measured.
    """
    write = figures_to(out)
    rows: list[dict[str, Any]] = []
    for workload in workloads:
        lines = measured(workload)
        console.print(table(workload, lines))
        rows += [line.as_json() for line in lines]
        write({"rows": rows})
    console.print(
        "Ratio: examples per second over the reference's (trainer float32; private ones: Opacus), "
        "median of the pairs (smallest to largest). Limit: float32 matrix products of this "
        "machine over the operations of a step. Memory: peak of the process over the reference's.",
        soft_wrap=True,
    )


def measured(workload: Workload) -> list[Line]:
    """Run all contestants on a workload in turn."""
    done = timed_in_turn(contestants(workload), WINDOWS)
    products = done.pop(f"products {PLAIN[0]}")
    limit = None
    if workload.tokens:
        from simulations.bench.limit import operations_per_example

        limit = products.rate / operations_per_example(workload.tokens, workload.batch_size)
    return [_line(workload, each, done, limit) for each in done.values()]


def _line(workload: Workload, timed: Timed, done: Mapping[str, Timed], limit: float | None) -> Line:
    private = timed.name.endswith(PRIVATE) or timed.name == PRIVATE_REFERENCE
    reference = done[PRIVATE_REFERENCE if private else REFERENCE]
    pairs = ratios(timed, reference)
    memory = None
    if timed.peak_bytes and reference.peak_bytes:
        memory = timed.peak_bytes / reference.peak_bytes
    share = timed.rate / limit if limit else None
    against = pairs[0], statistics.median(pairs), pairs[-1]
    return Line(workload, timed, reference.name, against, share, memory)


def table(workload: Workload, lines: Sequence[Line]) -> Table:
    """One line a contestant."""
    drawn = Table(title=f"{workload.name}, batch {workload.batch_size}")
    drawn.add_column("contestant")
    for name in ("examples/s", "ratio", "of limit", "peak MB", "memory", "accuracy %"):
        drawn.add_column(name, justify="right")
    for line in lines:
        least, middle, most = line.against
        peak, accuracy = line.timed.peak_bytes, line.timed.report.get("accuracy")
        drawn.add_row(
            line.timed.name,
            f"{line.timed.rate:.1f}",
            f"{middle:.2f} ({least:.2f}-{most:.2f})",
            _optional(line.limit_share, "{:.0%}"),
            _optional(peak and peak / 1e6, "{:.0f}"),
            _optional(line.memory, "{:.2f}"),
            _optional(accuracy and 100 * accuracy, "{:.1f}"),
        )
    return drawn


def _optional(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
