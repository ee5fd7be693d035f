"""``deal ledger``: a site's book of private releases, read, checked, and certified."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from deal_core.errors import UserError, at_home
from deal_core.privacy.certificate import (
    certificate,
    check_certificate,
    composed_over,
    told_events,
)
from deal_core.privacy.events import assumed_honest, common_unit, composed, unit_text
from deal_core.privacy.ledger import FILE, Entry, Ledger, LedgerError, LedgerUnusable
from server.results import rounded_up
from simulations.output import print_line, write_file

T = TypeVar("T")


def verify(folder: str, certificate_file: str, console: Console, disjoint_tasks: bool) -> None:
    """Check the chain of a ledger, or a certificate, or both; say what was spent."""
    if folder:
        entries = checked_entries(open_ledger(folder))
        print_line(console, f"ledger: {len(entries)} entries, the chain holds")
        for line in _summary(entries, disjoint_tasks):
            print_line(console, line)
    if not certificate_file:
        return
    said = check_certificate(_read_json(at_home(certificate_file)))
    print_line(console, f"certificate: signature good, {said['entries']} entries")
    if folder and not _are_of(said, entries):
        raise UserError(
            f"{certificate_file}: is not of the ledger in {folder}; name the folder that it was "
            "made from, or none"
        )


def export(folder: str, out: str, console: Console, disjoint_tasks: bool) -> None:
    """Write a signed certificate. UserError: the ledger is empty or cannot be trusted."""
    ledger = open_ledger(folder)
    signed = trusted(lambda: certificate(ledger, disjoint_tasks))
    path = write_file(out, json.dumps(signed, indent=1) + "\n")
    print_line(console, f"{path}: {signed['statement']['entries']} entries, signed")


def _summary(entries: list[Entry], disjoint_tasks: bool) -> list[str]:
    if not entries:
        return ["nothing was spent"]
    events = [entry.event for entry in entries]
    protected = [event for event in events if event.protected]
    unprotected, lines = len(events) - len(protected), []
    if protected:
        delta = min(event.delta for event in protected)
        epsilon = composed(protected, delta, disjoint_tasks)
        over = composed_over(disjoint_tasks, unprotected)
        unit = unit_text(*common_unit((event.unit, event.unit_column) for event in protected))
        shown = rounded_up(epsilon, 4)
        lines.append(f"epsilon {shown} at delta = {rounded_up(delta, 3)} per {unit}, over {over}")
        lines.append(assumed_honest(protected))
    elif unprotected:
        lines.append(f"{unprotected} releases left without protection: no epsilon holds for them")
    if any(event.simulation_only for event in events):
        lines.append("simulation only: some noise came from a seed, so nothing is guaranteed")
    return lines


def _are_of(said: dict[str, Any], entries: list[Entry]) -> bool:
    """Return whether a certificate's events are the first of a ledger, up to its head."""
    first = entries[: said["entries"]]
    same = said["events"] == told_events(first)
    return bool(first) and same and said["head"] == first[-1].hash


def open_ledger(folder: str) -> Ledger:
    """Return the ledger in a state directory. UserError: there is none."""
    path = at_home(folder)
    if not (path / FILE).exists():
        raise UserError(
            f"{folder}: no {FILE} here; name a site's state directory (in a simulation: "
            "RUN/sites/CLIENT)"
        )
    return Ledger(path)


def checked_entries(ledger: Ledger) -> list[Entry]:
    """Return the entries of a ledger, after a check of its chain, or raise UserError."""
    return trusted(ledger.entries)


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
