"""A folder holds the figures of one kind, and a report of them."""

from __future__ import annotations

from pathlib import Path

from deal_core.errors import UserError

FIGURES = {
    "results.json": "a run",
    "study.json": "a study",
    "budgets.json": "a budget study",
    "audit.json": "an audit",
    "membership.json": "an audit of membership",
}
"""Where they are to what they are of."""


def require_one_kind(out: Path, own: str) -> None:
    """Check that a folder has no figures of another kind: their report would be replaced.

    Args:
        out: the folder; it need not be there.
        own: the file of :data:`FIGURES` that will be written.

    Raises:
        UserError: it has.
    """
    for file, kind in FIGURES.items():
        if file != own and (out / file).exists():
            raise UserError(f"{out}: holds {kind}; name another --out")
