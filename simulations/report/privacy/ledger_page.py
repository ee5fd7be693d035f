"""A site's ledger as one document for its data protection officer, in plain English."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime

from client.egress import FIELDS
from deal_core.privacy.certificate import composed_over
from deal_core.privacy.events import (
    CLEAR_COUNTS,
    KEEPER_ALONE,
    LedgerEvent,
    assumed_honest,
    common_unit,
    unit_text,
)
from deal_core.privacy.policy import Policy
from server.results import rounded_up
from simulations.report.page.blocks import (
    Block,
    Bullets,
    Cell,
    Facts,
    Folded,
    Heading,
    Notice,
    Page,
    Section,
    Table,
    Text,
    Tile,
    Tiles,
    at_most,
    decimal,
    whole,
)
from simulations.report.privacy.ledger_record import Charge, LedgerRecord

COMPUTED = {
    "record": "A small adapter of a language model was trained here on the site's records. The "
    "influence of each record on a step was cut to a bound, and noise was added, before anything "
    "left. What left is the noised adapter.",
    "client": "A small adapter of a language model was trained here. Its whole update was cut to a "
    "bound and noise was added, before it left.",
    "counts": "Right answers of the model on the site's test records were counted. Noise was added "
    "to the counts before they left.",
    "none": "A small adapter of a language model was trained here on the site's records, or what "
    "the model makes of them was summed. No noise was added: what left may tell of single records.",
    "trusted-server": "A small adapter of a language model was trained here and left without "
    "noise: the server was trusted to add it.",
    "clear-counts": "Right answers of the model on the site's test records were counted, and the "
    "counts left as they are.",
}
"""Mechanism of a release to what was done."""
IN_SUM = (
    "What was learnt on the site's records, or their sums, was put under masks, and added to that "
    "of other sites. The influence of each record was cut to a bound. The site added its share of "
    "the noise. Nobody can read what left without that of the other sites; with it the sum has the "
    "whole noise, as long as the sites are honest that the promise names."
)
"""The same where sites share the noise of a sum."""
NEVER_LEFT = (
    "texts, labels and answers of any record",
    "names, ids and numbers that stand in the data; names of files, folders and columns",
    "gradients or losses of single records",
    "the log of the site, error messages and their texts",
    "this ledger, and the keys of the site",
)
NOT_COVERED = (
    "How many records the site has of a task counts as public in the mathematics: rate and steps "
    "of a release, which this page and a certificate hold, tell it, and so may an epsilon that is "
    "told.",
    "How long the site takes to answer is not hidden.",
    "Names of tasks and labels are public by agreement.",
    "The machine of the site, its administrator, and the code that the site has allowed are "
    "trusted.",
)
RUN_LETTERS = 8
"""Of the name of a run; the list of every release has all of it."""
RECORDS = {
    "status": "how a request ended",
    "site": "which client it is",
    "metrics": "figures beside an update",
    "counts": "counts of right answers",
}
"""Record of a reply to what it is, in words."""

LARGEST_TOLD = 20.0
"""An epsilon whose factor of chances, some 485 million, still says something."""


def ledger_page(record: LedgerRecord) -> Page:
    """Return the page."""
    seeded = any(entry.event.simulation_only for entry in record.entries)
    state, tone = ("chain verified", "good") if record.entries else ("empty", "warn")
    return Page(
        kind="Record of private releases",
        title=record.name,
        subtitle="What left this site, what protected it, and what that has cost: for the data "
        "protection officer",
        sections=tuple(_sections(record, seeded)),
        state=state,
        tone=tone,  # type: ignore[arg-type]
        meta=(
            f"{len(record.entries)} releases in the ledger",
            f"made {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        ),
        source="ledger.sqlite",
    )


def _sections(record: LedgerRecord, seeded: bool) -> Iterator[Section]:
    yield Section("short", "In short", tuple(_short(record, seeded)))
    yield Section("computed", "What was computed here", tuple(_computed(record)))
    yield Section("spent", "What it has cost", tuple(_spent(record)))
    yield Section("left", "What left, and what did not", tuple(_left(record)))
    if record.site is not None and record.site.policy is not None:
        yield Section("policy", "What the site allows", (_policy(record.site.policy),))
    yield Section("limits", "What the guarantee does not cover", tuple(_limits(record)))
    yield Section("check", "How to check this page", tuple(_check(record)))


def _short(record: LedgerRecord, seeded: bool) -> Iterator[Block]:
    if not record.entries:
        yield Text("The ledger is empty: nothing that it keeps account of has left this site.")
        return
    if seeded:
        yield Notice(
            "Simulation only: some noise came from a seed. Who knows the seed can take it off, so "
            "nothing of what follows is guaranteed. At a real site noise never comes from a seed.",
            "bad",
        )
    if record.unprotected:
        yield Notice(
            f"{len(record.unprotected)} releases left without protection. For the records that "
            "they were made from no epsilon holds.",
            "bad",
        )
    yield Tiles(tuple(_tiles(record)))
    if record.epsilon is not None and record.delta is not None:
        yield from (Text(text) for text in promise(record, record.epsilon, record.delta))


def _tiles(record: LedgerRecord) -> Iterator[Tile]:
    unit = _unit(record)
    if record.epsilon is not None and record.delta is not None:
        at = f"at delta = {rounded_up(record.delta, 3)}"
        yield Tile("Epsilon spent", at_most(record.epsilon, 4), "", at)
        yield Tile("Limit", decimal(record.limit, 4), "", _whose_limit(record))
        yield Tile("Protects", f"one {unit}", "", "the unit of privacy")
    yield Tile("Releases", whole(len(record.entries)), "", "each is a line of the ledger")
    yield Tile("Without protection", whole(len(record.unprotected)))


def _whose_limit(record: LedgerRecord) -> str:
    if record.limit is None:
        return "none is known"
    policy = record.site.policy if record.site else None
    return "of the site's policy" if policy and policy.max_epsilon else "of the runs' plans"


def _unit(record: LedgerRecord) -> str:
    units = [(entry.event.unit, entry.event.unit_column) for entry in record.protected]
    return unit_text(*common_unit(units)) if units else "record"


def promise(record: LedgerRecord, epsilon: float, delta: float) -> Iterator[str]:
    """Yield the guarantee in words: no epsilon without delta, unit, extent and trust."""
    unit = _unit(record)
    yield (
        f"All protected releases together have spent epsilon = {rounded_up(epsilon, 4)} at "
        f"delta = {rounded_up(delta, 3)} per {unit}. It is composed over "
        f"{composed_over(record.disjoint_tasks, len(record.unprotected))}."
    )
    yield _in_chances(epsilon, delta, unit)
    trust = assumed_honest([entry.event for entry in record.protected])
    yield (
        "It holds against everybody but the keeper of this ledger. At a site, that is everybody "
        "outside of the site: the server, the other sites, who reads the network, and who is given "
        "the model, also all together. Nobody of them has to be honest."
        if trust == KEEPER_ALONE
        else f"It holds only if those are honest whom it counts on. {trust[0].upper()}{trust[1:]}."
    )


def _in_chances(epsilon: float, delta: float, unit: str) -> str:
    """Return what an epsilon means, as people read it."""
    if epsilon > LARGEST_TOLD:
        return (
            f"That promises next to nothing: what anyone has seen of it may be thousands of "
            f"millions of times as likely because one {unit} was in the data."
        )
    return (
        f"That means: whatever anyone has seen of it, it would have been seen with a chance of at "
        f"most {_times(math.exp(epsilon))} times as much, or as little, had any one {unit} not "
        f"been in the data; but for a chance of {rounded_up(delta, 3)}, one in "
        f"{1 / delta:,.0f}, of which nothing is promised."
    )


def _times(factor: float) -> str:
    """Return a factor of chances, and never a smaller one."""
    return rounded_up(factor, 2) if factor < 10 else f"{math.ceil(factor):,}"


def _computed(record: LedgerRecord) -> Iterator[Block]:
    counted = Counter(map(_kind, (entry.event for entry in record.entries)))
    if not counted:
        yield Text("Nothing.")
    for (kind, text), count in counted.items():
        yield Heading(f"{count} × {kind}")
        yield Text(text)
    if record.site is not None:
        tasks = ", ".join(record.site.data.labels) or "–"
        models = ", ".join(record.site.models) or "–"
        yield Facts((("tasks that the site takes part in", tasks), ("base models", models)))


def _kind(event: LedgerEvent) -> tuple[str, str]:
    """Return what kind of release it was, and what was done."""
    if event.assumes and event.mechanism == "record":
        return f"{event.mechanism}, noise in a sum", IN_SUM
    return event.mechanism, COMPUTED.get(event.mechanism, "A release of another kind.")


def _spent(record: LedgerRecord) -> Iterator[Block]:
    if not record.entries:
        yield Text("Nothing.")
        return
    yield Text(
        "A row is all releases of one kind for one task of one run. The epsilon of a row is that "
        "of the row alone; rows do not simply add up, and the total above is composed from all of "
        "them."
    )
    yield Table(
        "Charges by run and task",
        (
            *("run", "task", "kind", "from", "to", "releases", "steps", "sampling rate"),
            *("noise multiplier", "clipping bound", "delta", "epsilon, alone"),
        ),
        tuple(_row(charge) for charge in record.charges),
        words=(1, 2, 3, 4),
    )
    yield Folded("Every release", (_entries(record),))


def _row(charge: Charge) -> tuple[Cell, ...]:
    if charge.epsilon is None:
        figures: tuple[Cell, ...] = ("–", "–", "none", "–", "–", "no bound")
    else:
        figures = (
            whole(charge.steps),
            decimal(charge.sample_rate, 4),
            decimal(charge.noise_multiplier, 4),
            decimal(charge.clipping_bound, 4),
            at_most(charge.delta),
            at_most(charge.epsilon, 4),
        )
    settings, _, own = charge.run.partition(" ")
    place = (own or settings[:RUN_LETTERS], charge.task or "all tasks", charge.mechanism)
    return (*place, _day(charge.first), _day(charge.last), whole(charge.releases), *figures)


def _day(time: str) -> str:
    return time[:16].replace("T", " ")


def _entries(record: LedgerRecord) -> Table:
    rows = tuple(
        (
            str(entry.seq),
            _day(entry.time),
            entry.event.run,
            entry.event.task or "all tasks",
            entry.event.mechanism,
            str(entry.event.stage + 1),
            str(entry.event.server_round),
            decimal(entry.event.noise_multiplier, 4) if entry.event.protected else "none",
        )
        for entry in record.entries
    )
    columns = ("no.", "time (UTC)", "run", "task", "kind", "stage", "round", "noise multiplier")
    return Table("Every release, in order", columns, rows, words=(1, 2, 3, 4))


def _left(record: LedgerRecord) -> Iterator[Block]:
    yield Heading("What never left")
    yield Bullets(NEVER_LEFT)
    yield Heading("What could leave")
    yield Text(
        "A reply is looked at a last time before it is sent. What is not in this list does not "
        "leave, whoever put it there. Under a mechanism the loss, the duration and the number of "
        "records do not leave either."
    )
    rows: list[tuple[Cell, ...]] = [
        ("factors", "the adapter", "what was learnt; noised under a mechanism")
    ]
    for name, fields in FIELDS.items():
        kind = RECORDS.get(name, name)
        rows += [(field, kind, reason) for field, reason in fields.items()]
    yield Table("May be sent, and why", ("field", "part of a reply", "reason"), tuple(rows), (1, 2))


def _policy(policy: Policy) -> Table:
    values = policy.model_dump()
    rows = tuple((key, _shown(key, value)) for key, value in values.items())
    return Table("[policy] of site.toml; docs/privacy.md explains it", ("key", "value"), rows, (1,))


LIMITS = frozenset({"max_epsilon", "max_delta", "min_grad_norm", "max_grad_norm"})
"""Keys of a policy whose 0 is no limit."""


def _shown(key: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "–"
    if key in LIMITS and not value:
        return "no limit of its own"
    return str(value) or "–"


def _limits(record: LedgerRecord) -> Iterator[Block]:
    if any(entry.event.mechanism == CLEAR_COUNTS for entry in record.entries):
        yield Text("Counts of right answers on test records left as they are.")
    yield Bullets(NOT_COVERED)


def _check(record: LedgerRecord) -> Iterator[Block]:
    yield Text(
        "Every release is sealed with a hash of all before it; that chain was verified when this "
        "page was made. The page itself can be changed by whoever has it: a signed certificate of "
        "the same ledger cannot."
    )
    facts: list[tuple[str, Cell]] = [("releases", whole(len(record.entries)))]
    if record.entries:
        facts.append(("seal of the last one", record.entries[-1].hash))
    facts += [
        ("verify the ledger", "deal ledger verify STATE"),
        ("signed certificate", "deal ledger export STATE --out certificate.json"),
        ("make this page again", "deal report --privacy STATE"),
    ]
    yield Facts(tuple(facts))
    yield Text(
        "The page holds nothing of any record. Rates and steps tell how many records a task has, "
        "and it names runs, tasks and times."
    )
