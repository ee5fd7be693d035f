"""``audit.json`` and ``audit.md``: what an audit has shown, beside what was claimed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from textwrap import wrap

from deal_core.privacy.events import unit_text
from server.results import Strict, rounded_up
from simulations.audit.found import Figure, Found, Kind
from simulations.audit.judged import Judged
from simulations.output.files import DASH, row

WIDTH = 100
EXPLANATION = (
    "'Claim': epsilon that the ledger holds. 'At least': lower bound on epsilon, whatever the "
    "mechanism is. 'p': probability, at most, of guesses as right as these if the ledger is true; "
    "below 0.05 the claim is refuted. 'Refuted noise': the least, in units of the claimed noise, "
    "that is refuted, and the epsilon that the mechanism has at least if it is the claimed one "
    "but for its noise. 'Notices': noise so many times the claimed one, or less, is refuted by "
    "at least 80 % of such audits. 'Efficiency': how much better than chance the attack guessed, "
    "in units of the best one on an honest mechanism. Bounds hold with 95 % confidence, each by "
    "itself; one below the claim proves nothing."
)
MEANING: Mapping[Kind, str] = {
    "gradients": "Gradient canaries: records (where groups are protected, groups of records) whose "
    "gradient is 100 times as long as the bound, sampled, clipped and noised by the mechanism "
    "itself; every noised gradient is seen.",
    "texts": "Text canaries: real examples (where groups are protected, all of a group) with "
    "random labels. Membership: the site's other "
    "training records against its test records, by how much their loss fell; intervals are 95 % "
    "bootstrap intervals.",
    "sums": "Gradient canaries in the sum: records (or groups) of one site whose gradient is 100 "
    "times as long as the bound. The attacker is the server with as many other sites as the noise "
    "is planned against, and as many more have failed as may: every sum over the others is seen.",
}
NOBODY_ELSE = "against everybody but the site itself, the server included"
"""Whom a claim takes to be honest, where the noise is all the site's own."""


class AuditedCell(Strict):
    """One budget: what it was asked to be, and what its attacks have shown."""

    epsilon: str
    attacks: list[Judged]

    @property
    def strongest(self) -> Judged:
        """The attack that has shown most."""
        return max(self.attacks, key=lambda each: each.bound.epsilon)

    @property
    def trainings(self) -> list[Found]:
        """The trainings of all attacks."""
        return [found for each in self.attacks for found in each.trainings]


class Audit(Strict):
    """Schema of ``audit.json``."""

    schema_version: int = 2
    experiment: str
    cells: list[AuditedCell]


def markdown(audit: Audit) -> str:
    """Return the whole page."""
    trainings = [found for cell in audit.cells for found in cell.trainings]
    kinds = [kind for kind in MEANING if any(found.kind == kind for found in trainings)]
    who = _who(trainings[0])
    text = [who, claims(trainings), EXPLANATION, *(MEANING[kind] for kind in kinds)]
    lines = [f"# Audit of {audit.experiment}", "", *wrap(" ".join(text), WIDTH), ""]
    lines += list(attack_table(audit))
    if any(each.membership for cell in audit.cells for each in cell.attacks):
        lines += ["", *membership_table(audit)]
    if any(each.simulation_only for each in trainings):
        lines += ["", "Simulation only: the noise came from a seed."]
    return "\n".join(lines) + "\n"


def _who(found: Found) -> str:
    return f"Client {found.client}" + (" among all." if found.kind == "sums" else " alone.")


def claims(trainings: list[Found]) -> str:
    """Return what every epsilon of an audit is of."""
    deltas = sorted({found.delta for found in trainings})
    units = {(found.unit, found.unit_column, found.assumes) for found in trainings if found.unit}
    told = [
        f"per {unit_text(unit, column)}, over all rounds and tasks, {_against(assumes)}"
        for unit, column, assumes in sorted(units)
    ]
    at = " or ".join(rounded_up(delta, 3) for delta in deltas)
    which = ", its attack's own" if len(deltas) > 1 else ""
    return f"Every epsilon is at delta = {at}{which} {'; '.join(told) or 'of what leaves'}."


def _against(assumes: str) -> str:
    return f"if these are honest: {assumes}" if assumes else NOBODY_ELSE


def attack_table(audit: Audit) -> Iterator[str]:
    """Yield a row for each attack under each budget."""
    heads = ("at least", "p", "refuted noise", "notices", "efficiency")
    yield row("mechanism", "claim", "canaries", *heads, "verdict")
    yield "|---|---:|---|" + "---:|" * len(heads) + "---|"
    for cell in audit.cells:
        for each in cell.attacks:
            yield row(
                each.trainings[0].mechanism,
                "none" if each.claimed is None else rounded_up(each.claimed, 3),
                f"{len(each.trainings)} × {each.trainings[0].outcomes[0].canaries} {each.kind}",
                f"{each.bound.epsilon:.2f}",
                DASH if each.p_value is None else f"{each.p_value:.2g}",
                _least(each),
                DASH if each.notices is None else _scale(each.notices.scale),
                DASH if each.notices is None else f"{each.notices.efficiency:.2f}",
                _verdict(each),
            )


def _least(judged: Judged) -> str:
    least = judged.least_refuted
    if least is None:
        return DASH if judged.p_value is None else "none"
    return f"× {least.scale:.2f}: {least.epsilon:.2f}"


def _scale(scale: float) -> str:
    return f"× {scale:.2f}" if scale else "nothing"


def _verdict(judged: Judged) -> str:
    if judged.claimed is None:
        return "no claim"
    return "REFUTED" if judged.refuted else "not refuted"


def membership_table(audit: Audit) -> Iterator[str]:
    """Yield a row for each membership inference; only its head where there is none."""
    yield row("mechanism", "claim", "members", "others", "AUC", "TPR at 1 % FPR")
    yield "|---|" + "---:|" * 5
    for cell in audit.cells:
        for each in cell.attacks:
            attack = each.membership
            if attack is None:
                continue
            found = attack.true_positives
            yield row(
                each.trainings[0].mechanism,
                "none" if each.claimed is None else rounded_up(each.claimed, 3),
                str(attack.members),
                str(attack.others),
                _figure(attack.auc, 1, 3),
                "fewer than 100 others" if found is None else _figure(found, 100, 1) + " %",
            )


def _figure(figure: Figure, scale: float, digits: int) -> str:
    value, low, high = (f"{scale * v:.{digits}f}" for v in (figure.value, figure.low, figure.high))
    return f"{value} [{low}, {high}]"
