"""The pages of audits: what attacks have shown, beside what was claimed; and who is in what leaves
the sites."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from server.results import rounded_up
from simulations.audit import membership
from simulations.audit.found import Kind
from simulations.audit.judged import Judged
from simulations.audit.tables import (
    EXPLANATION,
    MEANING,
    Audit,
    AuditedCell,
    attack_table,
    claims,
    membership_table,
)
from simulations.output.stored import read_stored
from simulations.report.blocks import Block, Figure, Notice, Page, Section, Text, from_markdown
from simulations.report.charts import Dot, dots

FILE = "audit.json"


def audit_page(folder: Path) -> Page:
    """Return the page of the audit in a folder.

    Raises:
        UserError: its file cannot be read.
    """
    audit = read_stored(Audit, folder / FILE, "audit")
    refuted = [judged for cell in audit.cells for judged in cell.attacks if judged.refuted]
    trainings = [found for cell in audit.cells for found in cell.trainings]
    return Page(
        kind="Audit",
        title=audit.experiment,
        subtitle="Attacks on what is promised: what they have shown, and what they could have",
        sections=tuple(_sections(audit)),
        state="a claim is refuted" if refuted else "no claim is refuted",
        tone="bad" if refuted else "good",
        meta=(f"{len(audit.cells)} budgets", f"{len(trainings)} trainings"),
        source=FILE,
    )


def _sections(audit: Audit) -> Iterator[Section]:
    yield Section("summary", "What the attacks have shown", tuple(_summary(audit)))
    if any(each.membership for cell in audit.cells for each in cell.attacks):
        told = "Is a record a member of the training data? An AUC of 0.5 is chance."
        table = from_markdown(membership_table(audit), "Membership inference, 95 % intervals")
        yield Section("membership", "Membership inference", (Text(told), *table))
    kinds = [kind for kind in MEANING if any(kind in _kinds(cell) for cell in audit.cells)]
    meanings = (Text(MEANING[kind]) for kind in kinds)
    yield Section("reading", "How to read it", (Text(EXPLANATION), *meanings))


def _kinds(cell: AuditedCell) -> list[Kind]:
    return [found.kind for found in cell.trainings]


def _summary(audit: Audit) -> Iterator[Block]:
    trainings = [found for cell in audit.cells for found in cell.trainings]
    refuted = [judged for cell in audit.cells for judged in cell.attacks if judged.refuted]
    if refuted:
        yield Notice(
            f"{len(refuted)} attacks refute what the ledger claims: the mechanism protects less.",
            "bad",
        )
    else:
        yield Notice("No attack refutes a claim. That is no proof: a better one might.", "good")
    if any(each.simulation_only for each in trainings):
        yield Notice("Simulation only: the noise came from a seed.")
    yield Text(claims(trainings))
    yield _figure(audit)
    yield from from_markdown(attack_table(audit), "Every attack under every budget")


def _figure(audit: Audit) -> Figure:
    rows = [
        Dot(
            _name(cell, judged),
            judged.bound.epsilon,
            marked=judged.refuted,
            hollow=judged.claimed is None,
            before=judged.claimed,
        )
        for cell in audit.cells
        for judged in cell.attacks
    ]
    delta = audit.cells[0].attacks[0].bound.delta
    return dots(
        "Lower bound on epsilon by each attack (filled) and what was claimed (hollow, grey). An "
        "attack at the right of its claim refutes it.",
        rows,
        f"epsilon at delta = {rounded_up(delta, 2)}",
    )


def _name(cell: AuditedCell, judged: Judged) -> str:
    budget = "no privacy" if cell.epsilon == "inf" else f"budget {cell.epsilon}"
    return f"{budget}, {judged.kind}"


def membership_page(folder: Path) -> Page:
    """Return the page of the audit of membership in a folder.

    Raises:
        UserError: its file cannot be read.
    """
    path = folder / membership.FILE
    audit = read_stored(membership.MembershipAudit, path, "audit of membership")
    table = from_markdown(membership.told_table(audit.told), "Attacks on sums and heads")
    blocks = (*table, Text(membership.EXPLANATION))
    return Page(
        kind="Audit",
        title=audit.experiment,
        subtitle="Who is in what leaves the sites, as far as attacks tell",
        sections=(Section("membership", "Membership inference", blocks),),
        meta=(f"{audit.directions} directions",),
        source=membership.FILE,
    )
