"""The pages of audits: what attacks have shown, beside what was claimed; and who is in adapters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from simulations.audit import membership
from simulations.audit.command import EXPLANATION, Audit, attack_table, claims, meaning
from simulations.output.files import TextTable, blocks, read_stored
from simulations.report.blocks import Block, Page, Section, Table, Text

FILE = "audit.json"


def audit_page(folder: Path) -> Page:
    """Return the page of the audit in a folder, of what a ledger claims.

    Raises:
        UserError: its file cannot be read.
    """
    audit = read_stored(Audit, folder / FILE, "audit")
    refuted = any(cell.refuted for cell in audit.cells)
    trainings = sum(len(cell.trainings) for cell in audit.cells)
    reading = Text(EXPLANATION), Text(meaning(audit.cells[0].trainings[0]))
    return Page(
        kind="Audit",
        title=audit.experiment,
        subtitle="Attacks on what is promised: what they have shown",
        sections=(
            Section("summary", "What the attacks have shown", tuple(_summary(audit))),
            Section("reading", "How to read it", reading),
        ),
        state="a claim is refuted" if refuted else "no claim is refuted",
        tone="bad" if refuted else "good",
        meta=(f"{len(audit.cells)} budgets", f"{trainings} trainings"),
        source=FILE,
    )


def _summary(audit: Audit) -> Iterator[Block]:
    refuted = sum(cell.refuted for cell in audit.cells)
    if refuted:
        yield Text(
            f"{refuted} attacks refute what the ledger claims: the mechanism protects less.", "bad"
        )
    else:
        yield Text("No attack refutes a claim. That is no proof: a better one might.", "good")
    first = audit.cells[0].trainings[0]
    if first.simulation_only:
        yield Text("Simulation only: the noise came from a seed.", "warn")
    yield Text(claims(first))
    yield from _tables(attack_table(audit), "Every budget")


def membership_page(folder: Path) -> Page:
    """Return the page of the audit of membership in a folder.

    Raises:
        UserError: its file cannot be read.
    """
    audit = read_stored(membership.MembershipAudit, folder / membership.FILE, "audit of membership")
    table = _tables(membership.told_table(audit.told), "Attacks on adapters")
    explained = Text(membership.EXPLANATION)
    return Page(
        kind="Audit",
        title=audit.experiment,
        subtitle="Who is in the adapters that leave a site, as far as attacks tell",
        sections=(Section("membership", "Membership inference", (*table, explained)),),
        source=membership.FILE,
    )


def _tables(lines: Iterable[str], caption: str) -> list[Table]:
    """Return the tables of a part of a Markdown page."""
    parts = blocks(list(lines))
    return [Table(caption, p.columns, p.rows) for p in parts if isinstance(p, TextTable)]
