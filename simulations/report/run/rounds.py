"""Rounds: loss, time, bytes, and what the aggregation left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from simulations.report.charts.drawings import Axis, Curve, lines
from simulations.report.page.blocks import (
    Block,
    Cell,
    Facts,
    Figure,
    Figures,
    Section,
    Table,
    Text,
    decimal,
    pointer,
    size,
    time,
    whole,
)
from simulations.report.run.log import RoundLog
from simulations.report.run.record import RunRecord

PHASES = {
    "learn": "training",
    "prototypes": "sums",
    "probe": "sums",
}


def rounds(run: RunRecord) -> Section:
    """Return the section."""
    return Section("rounds", "Rounds", tuple(_blocks(run)))


def _blocks(run: RunRecord) -> Iterator[Block]:
    done = run.log.done
    if not done:
        yield Text("No round has ended.")
        return
    yield Facts(tuple(_facts(run)))
    figures = (
        _figure(run, "loss", "Mean training loss", [each.loss for each in done]),
        _figure(run, "error", "Aggregation error", [each.error for each in done]),
        _figure(run, "seconds", "Seconds", [each.seconds for each in done]),
    )
    drawn = tuple(each for each in figures if each is not None)
    if drawn:
        yield Figures(drawn)
    yield table(run)


def _facts(run: RunRecord) -> Iterator[tuple[str, Cell]]:
    yield "rounds played", f"{len(run.log.done)} of {run.log.planned}"
    if run.log.skipped:
        yield "rounds in which nothing was to be done", whole(len(run.log.skipped))
    yield "starts", whole(len(run.log.starts))
    if run.results is not None:
        for phase, seconds in run.results.seconds.items():
            yield f"time, {phase}", time(seconds, pointer("seconds", phase))
        yield "peak memory", size(run.results.peak_rss_bytes, pointer("peak_rss_bytes"))
    yield (
        "aggregation error",
        "relative difference of what the rule gives from the exact mean of the updates; 0 where "
        "nothing is aggregated",
    )


def _figure(run: RunRecord, name: str, title: str, values: Sequence[float | None]) -> Figure | None:
    """Return the figure; None where there is nothing to draw."""
    done = run.log.done
    if sum(value is not None for value in values) < 2 or not any(values):
        return None
    curve = Curve("", tuple(float(each.number) for each in done), tuple(values))
    small = all(value is None or value > 0 for value in values) and name == "error"
    spread = max(filter(None, values)) / min(filter(None, values)) > 20
    axis = Axis(
        "round",
        title.lower(),
        "y" if small and spread else "",
        breaks=_stage_ends(done),
        from_zero=True,
    )
    rows = tuple((str(each.number), decimal(v, 4)) for each, v in zip(done, values, strict=True))
    return Figure(
        f"{title} of each round. Dotted: ends of stages.",
        lines(name, f"{title} in each of {len(done)} rounds", [curve], axis),
        Table(f"{title} of each round", ("round", title.lower()), rows),
    )


def _stage_ends(done: Sequence[RoundLog]) -> tuple[float, ...]:
    return tuple(
        after.number - 0.5 for before, after in pairwise(done) if after.stage != before.stage
    )


def table(run: RunRecord) -> Table:
    """Return a row for each round."""
    error = pointer("aggregation_error") if run.results is not None else ""
    rows = tuple(
        (
            str(each.number),
            f"{each.stage + 1}",
            PHASES.get(each.phase, each.phase),
            ", ".join(each.tasks),
            f"{each.answered - len(each.excluded)} of {each.asked}",
            decimal(each.loss, 4),
            decimal(each.error, 3, f"{error}/{place}" if error else ""),
            time(each.seconds),
            size(each.bytes_up),
            size(each.bytes_down),
        )
        for place, each in enumerate(run.log.done)
    )
    columns = (
        *("round", "stage", "phase", "tasks", "clients", "mean loss", "aggregation error"),
        *("time", "sent per client", "received per client"),
    )
    return Table("Every round that has ended", columns, rows, words=(2, 3))
