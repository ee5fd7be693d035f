"""``deal bench secure-share``: what secure sums take of the processor time of real rounds."""

from __future__ import annotations

import importlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deal_core.config.experiment import Experiment
from deal_core.config.file import apply_overrides, parse_experiment
from simulations.bench.figures import figures_to

PARTS = {
    "masking": (
        ("client.secure.masked_input", "maskable_update"),
        ("client.secure.masked_input", "summed_arrays"),
        ("client.secure.masked_input", "Maskable.require"),
        ("client.secure.masked_input", "Maskable.masked"),
    ),
    "legs": (
        ("server.secure.protocol", "SecureLegs.open"),
        ("server.secure.protocol", "SecureLegs.mask_requests"),
        ("server.secure.protocol", "SecureLegs.add"),
        ("server.secure.protocol", "SecureLegs.total"),
    ),
}
"""What is done for a secure sum and not without it, by where: in a training request at the client;
in legs of its own, at clients and server, which in one process are one after another."""


@dataclass(frozen=True)
class ShareCase:
    """Rounds of one task of MedMCQA.

    Attributes:
        clients: all of them train in every round.
        rounds: measured; the first, which has what is done once a run, is told apart.
        examples: of all clients together.
    """

    clients: int = 10
    rounds: int = 4
    examples: int = 640


QUICK = ShareCase(clients=3, rounds=2, examples=12)


@dataclass
class Spent:
    """Processor seconds of rounds, whole and by part."""

    rounds: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})

    def share(self, part: str) -> float:
        """Return the part's share of a round, the median of those after the first."""
        pairs = list(zip(self.parts[part], self.rounds, strict=True))
        return statistics.median(own / whole for own, whole in pairs[1:] or pairs)


def bench(case: ShareCase, console: Console, out: str = "") -> None:
    """Measure, print the table, and, with ``out``, write it as JSON.

    Raises:
        UserError: ``out`` cannot be written; nothing was measured.
    """
    write = figures_to(out)
    spent = measure(case)
    drawn = Table(title=f"Secure sums in rounds of {case.clients} clients, one process")
    for column in ("round", "s", *PARTS, "together"):
        drawn.add_column(column, justify="right")
    for number, whole in enumerate(spent.rounds):
        own = [parts[number] for parts in spent.parts.values()]
        shown = [f"{each / whole:.1%}" for each in (*own, sum(own))]
        drawn.add_row(str(number + 1), f"{whole:.2f}", *shown)
    console.print(drawn)
    total = sum(spent.share(part) for part in PARTS)
    console.print(
        f"{total:.1%} of a round's processor time (median after the first), "
        f"{case.examples} examples among {case.clients} clients",
        soft_wrap=True,
    )
    write({"case": asdict(case), **asdict(spent), "share": total})


def measure(case: ShareCase) -> Spent:
    """Run the rounds; return what they and their parts take."""
    from simulations.engines.inprocess import run_inprocess

    spent = Spent()
    with tempfile.TemporaryDirectory() as folder, timed() as taken:
        marks: dict[str, Any] = {}

        def listen(event: dict[str, Any]) -> None:
            if event["event"] == "round_started":
                marks.update(begun=time.process_time(), before=dict(taken))
            if event["event"] == "round_finished":
                spent.rounds.append(time.process_time() - marks["begun"])
                for part, seconds in spent.parts.items():
                    seconds.append(taken[part] - marks["before"][part])

        run_inprocess(experiment_of(case, Path(folder) / "run"), listen)
    return spent


def experiment_of(case: ShareCase, out: Path) -> Experiment:
    """Return the run that is measured; counts of right answers are left out, training is not."""
    out.mkdir()
    tables = apply_overrides(
        {},
        [
            'data.tasks=["surgery"]',
            f"data.max_train={case.examples}",
            "data.max_test=4",
            'data.partition.kind="iid"',
            f"federation.clients={case.clients}",
            f"federation.rounds={case.rounds}",
            "aggregation.secure=true",
            "method.prototype.enabled=off",
            "privacy.metrics=none",
            "run.workers=1",
            "run.threads=1",
            f'run.out="{out}"',
        ],
    )
    return parse_experiment(tables, "bench")


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Add up the processor seconds of the functions of each part while the block lasts."""
    taken = dict.fromkeys(PARTS, 0.0)
    replaced: list[tuple[Any, str, Any]] = []
    for part, functions in PARTS.items():
        for module, name in functions:
            owner: Any = importlib.import_module(module)
            *outer, last = name.split(".")
            for step in outer:
                owner = getattr(owner, step)
            original = getattr(owner, last)
            replaced.append((owner, last, original))
            setattr(owner, last, _timed(original, taken, part))
    try:
        yield taken
    finally:
        for owner, name, original in replaced:
            setattr(owner, name, original)


def _timed(function: Callable[..., Any], taken: dict[str, float], part: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        begun = time.process_time()
        try:
            return function(*arguments)
        finally:
            taken[part] += time.process_time() - begun

    return call
