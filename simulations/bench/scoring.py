"""``deal bench scoring``: a language model chooses among many labels; shared prompts and branches
beside the plain model."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from simulations.bench.figures import figures_to
from simulations.bench.paired import Contestant, Timed, ratios, timed_in_turn
from simulations.bench.step_causal import SMOLLM2, default_precision

WINDOWS = 3
REFERENCE = "plain, each option alone"


@dataclass(frozen=True)
class Case:
    """What is scored in a window.

    Attributes:
        labels: options of a text.
        tokens: of a text; prompt and options come on top.
        texts: in a window of ours, which shares work among them; the plain model has one.
    """

    labels: int
    tokens: int = 64
    texts: int = 16


CASES = (Case(14), Case(77))
QUICK = (Case(4, 8, 2),)


def contestants(case: Case, precision: str, name: str) -> list[Contestant]:
    """All that are compared on a case."""
    from simulations.bench.scoring_works import deal_scoring, plain_scoring

    plain = (case.labels, case.tokens, 1, precision, name)
    given = (case.labels, case.tokens, case.texts, precision, name)
    return [
        Contestant(REFERENCE, plain_scoring, (*plain, False)),
        Contestant("plain, options of a text in a batch", plain_scoring, (*plain, True)),
        Contestant("deal", deal_scoring, given),
    ]


def bench(cases: Sequence[Case], console: Console, out: str = "", name: str = SMOLLM2) -> None:
    """Measure case by case, print each table as it is done, write all as JSON.

    Raises:
        UserError: ``out`` cannot be written; nothing was measured.
    """
    write = figures_to(out)
    precision = default_precision()
    rows: list[dict[str, Any]] = []
    for case in cases:
        done = timed_in_turn(contestants(case, precision, name), WINDOWS, warm_up=0)
        console.print(table(case, precision, done))
        rows += [as_json(case, each, done[REFERENCE]) for each in done.values()]
        write({"model": name, "precision": precision, "rows": rows})
    console.print(
        "Ratio: texts per second over those with each option alone, median of the pairs (smallest "
        "to largest). Memory: peak of the process over the same. Score: mean log-likelihood of "
        "the options of the first text, equal but for rounding.",
        soft_wrap=True,
    )


def as_json(case: Case, timed: Timed, reference: Timed) -> dict[str, Any]:
    """Return one row, flat."""
    pairs = ratios(timed, reference)
    return {
        **asdict(case),
        "contestant": timed.name,
        "texts_per_second": timed.rates,
        "texts_per_core_second": timed.rate / timed.report["threads"],
        "reference": REFERENCE,
        "ratio": (pairs[0], statistics.median(pairs), pairs[-1]),
        "peak_bytes": timed.peak_bytes,
        **timed.report,
    }


def table(case: Case, precision: str, done: Mapping[str, Timed]) -> Table:
    """One line a contestant."""
    drawn = Table(title=f"{case.labels} labels, {case.tokens} tokens, {precision}")
    drawn.add_column("contestant")
    for name in ("texts/core-s", "ratio", "peak MB", "memory", "score"):
        drawn.add_column(name, justify="right")
    reference = done[REFERENCE]
    for name, timed in done.items():
        pairs = ratios(timed, reference)
        peak, other = timed.peak_bytes, reference.peak_bytes
        drawn.add_row(
            name,
            f"{timed.rate / timed.report['threads']:.3f}",
            f"{statistics.median(pairs):.1f} ({pairs[0]:.1f}-{pairs[-1]:.1f})",
            f"{peak / 1e6:.0f}" if peak else "–",
            f"{peak / other:.2f}" if peak and other else "–",
            f"{timed.report['score']:.3f}",
        )
    return drawn
