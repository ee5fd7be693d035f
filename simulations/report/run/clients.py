"""Clients: how they differ, who is worst off, who was left out, what each has sent and spent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from statistics import fmean, pstdev

from server.results import ClientResult
from simulations.output.files import DASH
from simulations.report.charts.drawings import Dot, Level, dots
from simulations.report.page.blocks import (
    Block,
    Cell,
    Facts,
    Figure,
    Section,
    Table,
    Text,
    percent,
    pointer,
    size,
    time,
    whole,
)
from simulations.report.run.log import ClientLog
from simulations.report.run.record import RunRecord
from simulations.run.live_view import IDLE

DRAWN = 40
"""Up to so many clients are drawn: those with the lowest accuracy."""


def clients(run: RunRecord) -> Section:
    """Return the section."""
    return Section("clients", "Clients", tuple(_blocks(run)))


def _blocks(run: RunRecord) -> Iterator[Block]:
    yield Facts(tuple(_facts(run)))
    averages = {name: value for name, value in run.averages.items() if value is not None}
    if len(averages) > 1:
        yield _figure(run, averages)
    elif not averages:
        yield Text("Accuracy of each client is known when the run has finished.")
    yield table(run)


def _facts(run: RunRecord) -> Iterator[tuple[str, Cell]]:
    averages = {name: value for name, value in run.averages.items() if value is not None}
    yield "clients", whole(len(run.log.clients) or len(run.averages))
    if averages:
        low, high = (limit(averages, key=lambda n: averages[n]) for limit in (min, max))
        yield "worst client", f"{low}: {_text(averages[low])} %"
        yield "best client", f"{high}: {_text(averages[high])} %"
        yield "mean over clients", f"{_text(fmean(averages.values()))} %"
        spread = pstdev(averages.values())
        yield "standard deviation over clients", f"{100 * spread:.1f} points"
    left_out = {each.name: each.left_out for each in run.log.clients.values() if each.left_out}
    parts = (f"{name} ({count} ×)" for name, count in left_out.items())
    yield "left out of a round", ", ".join(parts) or "nobody"
    if run.results is not None:
        yield "sent by a client in every round", size(sum(run.results.wire.bytes_up))
        yield "received by a client in every round", size(run.results.wire.received)
    else:
        yield "sent per client so far", size(sum(each.bytes_up or 0 for each in run.log.done))


def _text(share: float) -> str:
    return f"{100 * share:.1f}"


def _figure(run: RunRecord, averages: dict[str, float]) -> Figure:
    ordered = sorted(averages, key=lambda name: averages[name])
    shown = ordered[:DRAWN]
    start = _zero_shots(run)
    rows = [
        Dot(
            f"client {name}",
            100 * averages[name],
            before=100 * start[name] if name in start else None,
        )
        for name in shown
    ]
    mean = 100 * fmean(averages.values())
    alt = f"Average accuracy of {len(shown)} clients at the end of the run, the lowest first"
    more = "" if len(shown) == len(ordered) else f", the {DRAWN} lowest of {len(ordered)}"
    cells = tuple(
        (f"client {name}", percent(start.get(name)), percent(averages[name])) for name in ordered
    )
    hollow = " Hollow: zero-shot." if start else ""
    return Figure(
        f"Average accuracy of each client on its own test examples, at the end{more}.{hollow}",
        dots("clients", alt, rows, "accuracy (%)", [Level(mean, "mean")]),
        Table("Accuracy of each client, in %", ("client", "zero-shot", "at the end"), cells),
    )


def _zero_shots(run: RunRecord) -> dict[str, float]:
    """Return client to the mean of what it found before any training."""
    found = {}
    for number, own in (run.results.per_client if run.results else {}).items():
        known = [value for value in own.zero_shot if value is not None]
        if known:
            found[run.log.name(number)] = fmean(known)
    return found


def table(run: RunRecord) -> Table:
    """Return a row for each client."""
    results = run.results.per_client if run.results else {}
    logs = dict(run.log.clients)
    for number in results:
        logs.setdefault(run.log.name(number), ClientLog(run.log.name(number)))
    numbers = {run.log.name(number): number for number in results}
    start = _zero_shots(run)
    rows = tuple(
        _row(run, log, numbers.get(name, ""), results.get(numbers.get(name, "")), start.get(name))
        for name, log in logs.items()
    )
    columns = (
        "client",
        "training examples",
        "test examples",
        "zero-shot",
        "accuracy",
        "lowest task",
        "replies used",
        "left out",
        "seconds a reply",
        "took no part",
    )
    return Table("Each client; accuracies in %", columns, rows, words=(5, 9))


def _row(
    run: RunRecord, log: ClientLog, number: str, found: ClientResult | None, start: float | None
) -> tuple[Cell, ...]:
    average = found.average_accuracy if found else None
    replies, seconds = len(log.replies), sum(log.replies.values())
    idle = Counter(log.idle.values())
    return (
        log.name,
        whole(_examples(log)),
        whole(sum(found.test_examples) if found else None),
        percent(start),
        percent(average, pointer("per_client", number, "average_accuracy") if number else ""),
        _lowest(run, found),
        whole(replies - len(log.excluded)),
        whole(log.left_out),
        time(seconds / replies if seconds else None),
        ", ".join(f"{IDLE.get(code, code)} ({n} ×)" for code, n in idle.items()) or DASH,
    )


def _examples(log: ClientLog) -> float | None:
    """Return the training examples of all tasks; None: the client does not say. Under privacy each
    client weighs 1, whatever it has."""
    told = log.examples.values()
    return sum(told) if any(count != 1 for count in told) else None


def _lowest(run: RunRecord, found: ClientResult | None) -> str:
    """Return the task that a client knows least at the end."""
    row = found.accuracy_matrix[-1] if found and found.accuracy_matrix else []
    known = {task: value for task, value in zip(run.tasks, row, strict=False) if value is not None}
    if not known:
        return "–"
    worst = min(known, key=lambda task: known[task])
    return f"{worst} ({_text(known[worst])})"
