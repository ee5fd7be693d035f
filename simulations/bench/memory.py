"""``deal bench memory``: what each measure saves at the local step, and what it costs in speed.

A ladder: every rung adds one measure to the one below it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from simulations.bench.figures import figures_to
from simulations.bench.measures import Measures
from simulations.bench.paired import Contestant, Timed, ratios, timed_in_turn
from simulations.bench.workloads import Workload

REFERENCE = "trainer float32"
LIBRARIES = "libraries alone"
SIZES = Workload(128, 32, 64)
QUICK = Workload(32, 4, 8)
WINDOWS = 4


LADDER: Mapping[str, Measures] = {
    "a loop of our own, PEFT's layers": Measures(),
    "+ adapted layers and attention": Measures(layers=True),
    "+ a batch in passes": Measures(layers=True, passes=True),
    "+ bfloat16 base": Measures("bfloat16", layers=True, passes=True),
    "+ memory kept (the default)": Measures("bfloat16", True, True, True),
}


class Libraries:
    """A process that has imported what training needs, and trains nothing."""

    def __init__(self) -> None:
        import peft  # noqa: F401
        import torch  # noqa: F401
        import transformers

        _ = transformers.AutoModel, transformers.AutoTokenizer

    def window(self) -> Mapping[str, float]:
        """Return a second of no work: the process only holds what it imports."""
        return {"work": 1.0, "seconds": 1.0}

    def report(self) -> Mapping[str, float]:
        """Return no figure: nothing is trained."""
        return {}


def contestants(workload: Workload) -> list[Contestant]:
    """The libraries, the Trainer, and the ladder."""
    from simulations.bench.step_deal import measured_work
    from simulations.bench.step_trainer import trainer_work

    found = [Contestant(LIBRARIES, Libraries)]
    for precision in ("float32", "bfloat16"):
        found.append(Contestant(f"trainer {precision}", trainer_work, (workload, precision)))
    found += [Contestant(name, measured_work, (workload, m)) for name, m in LADDER.items()]
    return found


def bench(workload: Workload, console: Console, out: str = "") -> None:
    """Measure, print the table, and write all figures as JSON.

    Raises:
        UserError: ``out`` cannot be written; nothing was measured.
    """
    write = figures_to(out)
    done = timed_in_turn(contestants(workload), WINDOWS)
    write({"workload": asdict(workload), "rows": _rows(done)})
    console.print(table(workload, done))
    console.print(
        "Memory: peak of the process, libraries and base model included. Ratios: to the Trainer in "
        "float32; speed as median of the pairs (smallest to largest).",
        soft_wrap=True,
    )


def _rows(done: Mapping[str, Timed]) -> list[dict[str, Any]]:
    return [
        {
            "contestant": name,
            "examples_per_second": timed.rates,
            "peak_bytes": timed.peak_bytes,
            **timed.report,
        }
        for name, timed in done.items()
    ]


def table(workload: Workload, done: Mapping[str, Timed]) -> Table:
    """One line a contestant."""
    drawn = Table(title=f"Peak memory of training, {workload.name}, batch {workload.batch_size}")
    drawn.add_column("contestant")
    for name in ("peak MB", "memory", "examples/s", "speed", "accuracy %"):
        drawn.add_column(name, justify="right")
    for name, timed in done.items():
        drawn.add_row(name, *cells(timed, done[REFERENCE]))
    return drawn


def cells(timed: Timed, reference: Timed) -> Sequence[str]:
    """Peak, its ratio, speed, its ratio, accuracy."""
    peak = timed.peak_bytes or 0
    share = f"{peak / reference.peak_bytes:.2f}" if reference.peak_bytes else "–"
    if timed.name == LIBRARIES:
        return f"{peak / 1e6:.0f}", share, "–", "–", "–"
    pairs = ratios(timed, reference)
    speed = f"{statistics.median(pairs):.2f} ({pairs[0]:.2f}-{pairs[-1]:.2f})"
    accuracy = f"{100 * timed.report['accuracy']:.1f}"
    return f"{peak / 1e6:.0f}", share, f"{timed.rate:.1f}", speed, accuracy
