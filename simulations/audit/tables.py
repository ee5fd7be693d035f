"""``audit.json`` and ``audit.md``: what an audit has shown, beside what was claimed."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import wrap

from deal_core.privacy.audit.claim import SIGNIFICANCE, LowerBound
from deal_core.privacy.events import unit_text
from server.results import Strict, rounded_up
from simulations.audit.run import Found
from simulations.output.files import DASH, head, row

WIDTH = 100
EXPLANATION = (
    "'Claim': epsilon that the ledger holds. 'At least': lower bound on epsilon, if the mechanism "
    "is the claimed one but for its noise. 'p': probability, at most, of guesses as right as "
    "these if the ledger is true; below 0.05 the claim is refuted. 'Refuted noise': the least, in "
    "units of the claimed noise, that is refuted; the bound is its epsilon. Bounds hold with 95 % "
    "confidence, each by itself; one below the claim proves nothing."
)
STEPS = (
    "Canaries: records (where groups are protected, groups of records) whose gradient is 100 times "
    "as long as the bound, sampled, clipped and noised by the mechanism itself; the attacker sees "
    "every noised gradient."
)
SUMS = (
    "Canaries: records (or groups) of one site whose gradient is 100 times as long as the bound. "
    "The attacker is the server with as many other sites as the noise is planned against, and as "
    "many more have failed as may: every sum over the others is seen."
)
NOBODY_ELSE = "against everybody but the site itself, the server included"
"""Whom a claim takes to be honest, where the noise is all the site's own."""


class AuditedCell(Strict):
    """One budget: what it was asked to be, and what the attack has shown.

    Attributes:
        epsilon: the budget, in words.
        p_value: of the claim: probability, at most, of guesses as right as these if the ledger is
            true.
        bound: on epsilon.
        trainings: the repetitions.
    """

    epsilon: str
    p_value: float
    bound: LowerBound
    trainings: list[Found]

    @property
    def claimed(self) -> float:
        """The largest of the repetitions', which may differ in the last digits."""
        return max(each.claimed for each in self.trainings)

    @property
    def refuted(self) -> bool:
        """Has the claim been shown to be wrong?"""
        return self.p_value < SIGNIFICANCE


class Audit(Strict):
    """Schema of ``audit.json``."""

    schema_version: int = 3
    experiment: str
    cells: list[AuditedCell]


def markdown(audit: Audit) -> str:
    """Return the whole page."""
    first = audit.cells[0].trainings[0]
    who = f"Client {first.client}" + (" among all." if first.in_sum else " alone.")
    text = " ".join([who, claims(first), EXPLANATION, meaning(first)])
    lines = [f"# Audit of {audit.experiment}", "", *wrap(text, WIDTH), ""]
    lines += list(attack_table(audit))
    if first.simulation_only:
        lines += ["", "Simulation only: the noise came from a seed."]
    return "\n".join(lines) + "\n"


def meaning(found: Found) -> str:
    """Return what was planted, and who attacked."""
    return SUMS if found.in_sum else STEPS


def claims(found: Found) -> str:
    """Return what every epsilon of an audit is of."""
    against = f"if these are honest: {found.assumes}" if found.assumes else NOBODY_ELSE
    return (
        f"Every epsilon is at delta = {rounded_up(found.delta, 3)} per "
        f"{unit_text(found.unit, found.unit_column)}, over all rounds and tasks, {against}."
    )


def attack_table(audit: Audit) -> Iterator[str]:
    """Yield a row for each budget."""
    yield from head("claim", "canaries", "at least", "p", "refuted noise", "verdict")
    for cell in audit.cells:
        scale = cell.bound.scale
        yield row(
            rounded_up(cell.claimed, 3),
            f"{len(cell.trainings)} × {cell.trainings[0].outcomes[0].canaries}",
            f"{cell.bound.epsilon:.2f}",
            f"{cell.p_value:.2g}",
            DASH if scale is None else f"× {scale:.2f}",
            "REFUTED" if cell.refuted else "not refuted",
        )
