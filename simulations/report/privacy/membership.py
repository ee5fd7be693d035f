"""The page of an audit of membership: who is in what leaves the sites, as far as attacks tell."""

from __future__ import annotations

from pathlib import Path

from simulations.audit.membership import EXPLANATION, FILE, MembershipAudit, told_table
from simulations.output.stored import read_stored
from simulations.report.page.blocks import Page, Section, Text, from_markdown

__all__ = ["FILE", "membership_report"]


def membership_report(folder: Path) -> Page:
    """Return the page.

    Raises:
        UserError: its file cannot be read.
    """
    audit = read_stored(MembershipAudit, folder / FILE, "audit of membership")
    table = from_markdown(told_table(audit.told), "Attacks on sums and heads", words=(1,))
    return Page(
        kind="Audit",
        title=audit.experiment,
        subtitle="Who is in what leaves the sites, as far as attacks tell",
        sections=(Section("membership", "Membership inference", (*table, Text(EXPLANATION))),),
        meta=(f"{audit.directions} directions",),
        source=FILE,
    )
