"""The pages of audits: what attacks have shown, beside what was claimed; and who is in what leaves
the sites."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from simulations.audit import membership
from simulations.audit.command import EXPLANATION, Audit, attack_table, claims, meaning
from simulations.output import read_stored
from simulations.report.blocks import Block, Page, Section, Text

FILE = "audit.json"


def audit_page(folder: Path) -> Page:
    """Return the page of the audit of budgets in a folder. UserError: it cannot be read."""
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
    yield attack_table(audit)


def membership_page(folder: Path) -> Page:
    """Return the page of the audit of membership in a folder. UserError: it cannot be read."""
    audit = read_stored(membership.MembershipAudit, folder / membership.FILE, "audit of membership")
    told = membership.told_table(audit.told), Text(membership.EXPLANATION)
    return Page(
        kind="Audit",
        title=audit.experiment,
        subtitle="Who is in what leaves the sites, as far as attacks tell",
        sections=(Section("membership", "Membership inference", told),),
        meta=(f"{audit.directions} directions",),
        source=membership.FILE,
    )
