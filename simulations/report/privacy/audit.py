"""The page of an audit: what attacks have shown, beside what was claimed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from server.results import rounded_up
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
from simulations.report.charts.drawings import Dot, dots
from simulations.report.page.blocks import (
    Block,
    Figure,
    Notice,
    Page,
    Section,
    Table,
    Text,
    at_most,
    decimal,
    from_markdown,
)

FILE = "audit.json"


def read_audit(folder: Path) -> Audit:
    """Return the audit in a folder.

    Raises:
        UserError: its file cannot be read.
    """
    return read_stored(Audit, folder / FILE, "audit")


def audit_page(audit: Audit) -> Page:
    """Return the page."""
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
    rows, cells = [], []
    for cell in audit.cells:
        for judged in cell.attacks:
            name = _name(cell, judged)
            claimed = judged.claimed
            rows.append(
                Dot(
                    name,
                    judged.bound.epsilon,
                    series=1 if judged.refuted else 0,
                    hollow=claimed is None,
                    before=claimed,
                )
            )
            cells.append((name, at_most(claimed), decimal(judged.bound.epsilon)))
    delta = audit.cells[0].attacks[0].bound.delta
    axis = f"epsilon at delta = {rounded_up(delta, 2)}"
    return Figure(
        "Lower bound on epsilon by each attack (filled) and what was claimed (hollow, grey). An "
        "attack at the right of its claim refutes it.",
        dots("audit", f"Lower bounds of {len(rows)} attacks", rows, axis, wide=True),
        Table("Claims and lower bounds", ("attack", "claimed", "at least"), tuple(cells)),
        narrow=dots("audit-narrow", f"Lower bounds of {len(rows)} attacks", rows, axis),
    )


def _name(cell: AuditedCell, judged: Judged) -> str:
    budget = "no privacy" if cell.epsilon == "inf" else f"budget {cell.epsilon}"
    return f"{budget}, {judged.kind}"
