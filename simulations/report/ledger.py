"""A site's book of private releases, read: ``deal ledger`` checks and certifies it, and
``deal report --privacy`` makes one page of it for the data protection officer, in plain English."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from client.egress import FIELDS
from client.site_file import SiteFile, read_site
from deal_core.errors import UserError, at_home
from deal_core.privacy.certificate import (
    certificate,
    check_certificate,
    meaning_of,
    most_units,
    told_events,
)
from deal_core.privacy.events import CLEAR_COUNTS, KEEPER_ALONE, composed, unit_text
from deal_core.privacy.ledger import FILE, Entry, Ledger, LedgerError, LedgerUnusable
from server.results import rounded_up
from simulations.output import DASH, Table, print_line, write_file
from simulations.report import blocks as html

T = TypeVar("T")
SITE_FILE = "site.toml"
COMPUTED = {
    "record": "A small adapter of a language model was trained here on the site's records. The "
    "influence of each record on a step was cut to a bound, and noise was added, before anything "
    "left. What left is the noised adapter.",
    "none": "A small adapter of a language model was trained here on the site's records, or what "
    "the model makes of them was summed. No noise was added: what left may tell of single records.",
    "clear-counts": "Right answers of the model on the site's test records were counted, and the "
    "counts left as they are.",
    "verdict": "Records that were held back from training were answered with new class means and "
    "without. Whether the answers are worse left as one bit, as it is.",
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
"""Of the name of a run."""
RECORDS = {
    "status": "how a request ended",
    "site": "which client it is",
    "metrics": "figures beside an update",
    "counts": "counts of right answers",
}
"""Record of a reply to what it is, in words."""

LARGEST_TOLD = 20.0
"""An epsilon whose factor of chances, some 485 million, still says something."""


def verify(folder: str, certificate_file: str, console: Console, disjoint_tasks: bool) -> None:
    """Check the chain of a ledger, or a certificate, or both; say what was spent."""
    if folder:
        entries = trusted(open_ledger(folder).entries)
        print_line(console, f"ledger: {len(entries)} entries, the chain holds")
        for line in _summary(entries, disjoint_tasks):
            print_line(console, line)
    if not certificate_file:
        return
    said = check_certificate(_read_json(at_home(certificate_file)))
    print_line(console, f"certificate: signature good, {said['entries']} entries")
    if folder:
        first = entries[: said["entries"]]
        same = first and said["events"] == told_events(first) and said["head"] == first[-1].hash
        if not same:
            raise UserError(
                f"{certificate_file}: is not of the ledger in {folder}; name the folder that it "
                "was made from, or none"
            )


def export(folder: str, out: str, console: Console, disjoint_tasks: bool) -> None:
    """Write a signed certificate. UserError: the ledger is empty or cannot be trusted."""
    ledger = open_ledger(folder)
    signed = trusted(lambda: certificate(ledger, disjoint_tasks))
    path = write_file(out, json.dumps(signed, indent=1) + "\n")
    print_line(console, f"{path}: {signed['statement']['entries']} entries, signed")


def _summary(entries: list[Entry], disjoint_tasks: bool) -> Iterator[str]:
    if not entries:
        yield "nothing was spent"
        return
    spent = meaning_of([entry.event for entry in entries], disjoint_tasks)
    if spent["epsilon"] is None:
        number = spent["unprotected"]
        yield f"{number} releases left without protection: no epsilon holds for them"
    else:
        delta, unit = rounded_up(spent["delta"], 3), unit_text(spent["unit"], spent["unit_column"])
        said = f"epsilon {rounded_up(spent['epsilon'], 4)} at delta = {delta} per {unit}"
        yield f"{said}, over {spent['composed_over']}"
        yield spent["assumes"]
    if spent["simulation_only"]:
        yield "simulation only: some noise came from a seed, so nothing is guaranteed"


def open_ledger(folder: str) -> Ledger:
    """Return the ledger in a state directory. UserError: there is none."""
    path = at_home(folder)
    if not (path / FILE).exists():
        raise UserError(
            f"{folder}: no {FILE} here; name a site's state directory (in a simulation: "
            "RUN/sites/CLIENT)"
        )
    return Ledger(path)


def trusted(read: Callable[[], T]) -> T:
    """Return what is read of a ledger. UserError: it cannot be read, or not trusted."""
    try:
        return read()
    except LedgerUnusable as error:
        raise UserError(str(error)) from None
    except LedgerError as error:
        raise UserError(f"the ledger cannot be trusted: {error}") from None


def _read_json(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); name a file of deal ledger export"
        ) from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: is no certificate; name a file of deal ledger export")
    return found


def ledger_page(folder: str) -> html.Page:
    """Return the page of the ledger in a state directory, after a check of all of it.

    Raises:
        UserError: no ledger in it, one that cannot be trusted, or a ``site.toml`` beside it that
            cannot be used.
    """
    ledger = open_ledger(folder)
    entries, site = trusted(ledger.entries), _site(ledger.folder)
    sections = {
        "In short": _short(entries, site, ledger),
        "What was computed here": _computed(entries, site),
        "What it has cost": _spent(entries),
        "What left, and what did not": _left(),
        "What the guarantee does not cover": _limits(entries),
        "How to check this page": _check(entries),
    }
    return html.Page(
        kind="Record of private releases",
        title=site.site.name if site else f"client {ledger.folder.name}",
        subtitle="What left this site, what protected it, and what that has cost: for the data "
        "protection officer",
        sections=tuple(
            html.Section(f"part-{number}", title, tuple(blocks))
            for number, (title, blocks) in enumerate(sections.items(), start=1)
        ),
        state="chain verified" if entries else "empty",
        tone="good" if entries else "warn",
        meta=(
            f"{len(entries)} releases in the ledger",
            f"made {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        ),
        source="ledger.sqlite",
    )


def _site(state: Path) -> SiteFile | None:
    """Return the site's own file, if it lies beside its state directory and names it. UserError:
    it lies there and cannot be used, so its limit is not known."""
    path = state.resolve().parent / SITE_FILE
    if not path.is_file():
        return None
    site = read_site(path)
    return site if Path(site.site.state) == state.resolve() else None


def _limit(site: SiteFile | None, ledger: Ledger) -> tuple[str, str]:
    """Return the largest epsilon that the site allows for ever, or else that a plan of the ledger
    was made for; and which of both it is."""
    if site and site.policy and site.policy.max_epsilon:
        return html.decimal(site.policy.max_epsilon, 4), "of the site's policy"
    plans = map(json.loads, trusted(ledger.plans).values())
    planned = max((float(plan["epsilon"]) for plan in plans if plan.get("epsilon")), default=None)
    return html.decimal(planned, 4), "of the runs' plans" if planned else "none is known"


def _short(entries: list[Entry], site: SiteFile | None, ledger: Ledger) -> Iterator[html.Block]:
    if not entries:
        yield html.Text("The ledger is empty: nothing that it keeps account of has left this site.")
        return
    disjoint = bool(site and site.policy and site.policy.disjoint_tasks)
    spent = meaning_of([entry.event for entry in entries], disjoint)
    epsilon, delta, unprotected = spent["epsilon"], spent["delta"], spent["unprotected"]
    if spent["simulation_only"]:
        yield html.Text(
            "Simulation only: some noise came from a seed. Who knows the seed can take it off, so "
            "nothing of what follows is guaranteed. At a real site noise never comes from a seed.",
            "bad",
        )
    if unprotected:
        yield html.Text(
            f"{unprotected} releases left without protection. For the records that they were made "
            "from no epsilon holds.",
            "bad",
        )
    counts = (
        ("Releases", html.whole(len(entries)), "each is a line of the ledger"),
        ("Without protection", html.whole(unprotected), ""),
    )
    if epsilon is None:
        yield html.Tiles(counts)
        return
    unit = unit_text(spent["unit"], spent["unit_column"])
    name = "Epsilon of the protected releases alone" if unprotected else "Epsilon spent"
    units = trusted(lambda: most_units(ledger))
    times = f" (n delta = {html.decimal(units * delta)} of n = {units})" if units else ""
    note = f"at delta = {html.at_most(delta)}" + "; none of the others" * bool(unprotected)
    limit = ("Limit", *_limit(site, ledger))
    protects = ("Protects", f"one {unit}", "the unit of privacy")
    yield html.Tiles(((name, html.at_most(epsilon, 4), note), limit, protects, *counts))
    yield html.Text(
        f"All protected releases together have spent epsilon = {html.at_most(epsilon, 4)} at "
        f"delta = {html.at_most(delta)}{times} per {unit}. It is composed over "
        f"{spent['composed_over']}."
    )
    yield html.Text(in_chances(epsilon, delta, unit))
    trust = spent["assumes"]
    yield html.Text(
        "It holds against everybody but the keeper of this ledger. At a site, that is everybody "
        "outside of the site: the server, the other sites, who reads the network, and who is given "
        "the model, also all together. None of them has to be honest."
        if trust == KEEPER_ALONE
        else f"It holds only if those are honest whom it counts on. {trust[0].upper()}{trust[1:]}."
    )


def in_chances(epsilon: float, delta: float, unit: str) -> str:
    """Return what an epsilon means, as people read it."""
    if epsilon > LARGEST_TOLD:
        return (
            f"That promises next to nothing: what anyone has seen of it may be thousands of "
            f"millions of times as likely because one {unit} was in the data."
        )
    factor = math.exp(epsilon)
    times = rounded_up(factor, 2) if factor < 10 else f"{math.ceil(factor):,}"
    return (
        f"That means: whatever anyone has seen of it, it would have been seen with a chance of at "
        f"most {times} times as much, or as little, had any one {unit} not been in the data; but "
        f"for a chance of {rounded_up(delta, 3)}, one in {1 / delta:,.0f}, of which nothing is "
        "promised."
    )


def _computed(entries: list[Entry], site: SiteFile | None) -> Iterator[html.Block]:
    counted = Counter(
        (entry.event.mechanism, bool(entry.event.assumes and entry.event.mechanism == "record"))
        for entry in entries
    )
    if not counted:
        yield html.Text("Nothing.")
    for (kind, in_sum), count in counted.items():
        yield html.Heading(f"{count} × {kind}{', noise in a sum' * in_sum}")
        yield html.Text(IN_SUM if in_sum else COMPUTED.get(kind, "A release of another kind."))
    if site is not None:
        tasks = ", ".join(site.data.labels) or DASH
        models = ", ".join(site.models) or DASH
        yield html.Facts((("tasks that the site takes part in", tasks), ("base models", models)))


def _spent(entries: list[Entry]) -> Iterator[html.Block]:
    if not entries:
        yield html.Text("Nothing.")
        return
    yield html.Text(
        "A row is all releases of one kind for one task of one run. The epsilon of a row is that "
        "of the row alone; rows do not simply add up, and the total above is composed from all of "
        "them."
    )
    columns = (
        *("run", "task", "kind", "from", "to", "releases", "steps", "sampling rate"),
        *("noise multiplier", "clipping bound", "epsilon, alone", "delta"),
    )
    kinds = groupby(entries, lambda each: (each.event.run, each.event.task, each.event.mechanism))
    rows = []
    for (run, task, kind), own in ((key, list(part)) for key, part in kinds):
        settings, _, named = run.partition(" ")
        when = (each.time[:16].replace("T", " ") for each in (own[0], own[-1]))
        events = [entry.event for entry in own]
        first, delta = events[0], min(event.delta for event in events)
        figures: tuple[str, ...] = (DASH, DASH, "none", DASH, "no bound", DASH)
        if first.protected:
            figures = (
                str(sum(event.steps for event in events)),
                f"{first.sample_rate:.4g}",
                f"{first.noise_multiplier:.4g}",
                f"{first.max_grad_norm:g}",
                rounded_up(composed(events, delta), 4),
                rounded_up(delta, 3),
            )
        place = (named or settings[:RUN_LETTERS], task or "all tasks", kind)
        rows.append((*place, *when, str(len(own)), *figures))
    yield Table("Charges by run and task", columns, tuple(rows))


def _left() -> Iterator[html.Block]:
    yield html.Heading("What never left")
    yield html.Bullets(tuple((each, "") for each in NEVER_LEFT))
    yield html.Heading("What could leave")
    yield html.Text(
        "A reply is looked at a last time before it is sent. What is not in this list does not "
        "leave, whoever put it there. Under a mechanism the loss, the duration and the number of "
        "records do not leave either."
    )
    rows = [("factors", "the adapter", "what was learnt; noised under a mechanism")]
    for name, fields in FIELDS.items():
        rows += [(field, RECORDS.get(name, name), reason) for field, reason in fields.items()]
    yield Table("May be sent, and why", ("field", "part of a reply", "reason"), tuple(rows))


def _limits(entries: list[Entry]) -> Iterator[html.Block]:
    if any(entry.event.mechanism == CLEAR_COUNTS for entry in entries):
        yield html.Text("Counts of right answers on test records left as they are.")
    yield html.Bullets(tuple((each, "") for each in NOT_COVERED))


def _check(entries: list[Entry]) -> Iterator[html.Block]:
    yield html.Text(
        "Every release is sealed with a hash of all before it; that chain was verified when this "
        "page was made. The page itself can be changed by whoever has it: a signed certificate of "
        "the same ledger cannot. The page holds nothing of any record. Rates and steps tell how "
        "many records a task has, and it names runs, tasks and times."
    )
    yield html.Facts(
        (
            ("releases", html.whole(len(entries))),
            ("seal of the last one", entries[-1].hash if entries else DASH),
            ("verify the ledger", "deal ledger verify STATE"),
            ("signed certificate", "deal ledger export STATE --out certificate.json"),
            ("make this page again", "deal report --privacy STATE"),
        )
    )
