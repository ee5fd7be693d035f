"""What went wrong: replies that were not used, rounds that were lost, stops."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime

from simulations.report.page.blocks import Block, Notice, Section, Table, Text, whole
from simulations.report.run.record import RunRecord

SHOWN = 200
"""Faults that are listed; the log has all."""
AGAIN = " (the round was played again after a resume)"


def faults(run: RunRecord) -> Section:
    """Return the section."""
    return Section("faults", "Faults", _blocks(run))


def _blocks(run: RunRecord) -> tuple[Block, ...]:
    found = run.log.faults
    if not found:
        return (Text("None: every reply that was asked for came and was used."),)
    counted = Counter((fault.what, fault.client) for fault in found if not fault.again)
    times = tuple((what, client or "–", whole(n)) for (what, client), n in counted.items())
    summary = Table("How often", ("what", "client", "times"), times, words=(1,))
    rows = tuple(
        (
            f"{datetime.fromtimestamp(fault.time, UTC):%Y-%m-%d %H:%M:%S}",
            str(fault.round) if fault.round else "–",
            fault.client or "–",
            fault.what,
            fault.why + AGAIN * fault.again,
        )
        for fault in found[:SHOWN]
    )
    listed = Table(
        "Each, in order (UTC)", ("time", "round", "client", "what", "why"), rows, (2, 3, 4)
    )
    more = Notice(f"{len(found)} in all; metrics.jsonl has the others.")
    first = (summary,) if counted else ()
    return (*first, more, listed) if len(found) > SHOWN else (*first, listed)
