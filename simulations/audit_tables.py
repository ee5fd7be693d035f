"""``audit.json`` and ``audit.md``: what an audit has shown, beside what was claimed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from server.results import Strict
from simulations.audit_found import Attack, Figure, Found, Kind
from simulations.markdown_table import DASH, row

EXPLANATION = (
    "A lower bound holds with 95 % confidence, each by itself; a bound above the claim refutes the "
    "claim, a bound below it proves nothing."
)
MEANING: Mapping[Kind, str] = {
    "gradients": "Gradient canaries: random directions of the largest norm that clipping lets "
    "through, inside the clipped sum.",
    "texts": "Text canaries: real examples with random labels. Membership: the site's other "
    "training records against its test records, by how much their loss fell; intervals are 95 % "
    "bootstrap intervals.",
    "clients": "Canary clients: each sends a random direction, far longer than the bound, in "
    "every round that it is drawn for.",
}
HEADS: Mapping[Kind, str] = {
    "gradients": "gradient canaries",
    "texts": "text canaries",
    "clients": "canary clients",
}
"""Kind of canaries to its column."""


class Cell(Strict):
    """One budget: what it was asked to be, and what its trainings have shown."""

    epsilon: str
    trainings: list[Found]

    @property
    def strongest(self) -> Found:
        """The training whose canaries have shown most."""
        return max(self.trainings, key=lambda each: each.bound.epsilon)


class Audit(Strict):
    """Schema of ``audit.json``."""

    schema_version: int = 1
    experiment: str
    cells: list[Cell]


def markdown(audit: Audit) -> str:
    """Return the whole page."""
    kinds, client = _kinds(audit), audit.cells[0].trainings[0].client
    who = "Canary clients alone." if "clients" in kinds else f"Client {client} alone."
    lines = [f"# Audit of {audit.experiment}", ""]
    lines += [" ".join([who, EXPLANATION, *(MEANING[kind] for kind in kinds)]), ""]
    lines += list(_table(audit))
    seeded = any(each.simulation_only for cell in audit.cells for each in cell.trainings)
    if seeded:
        lines += ["", "Simulation only: the noise came from a seed."]
    return "\n".join(lines) + "\n"


def _kinds(audit: Audit) -> list[Kind]:
    found = {each.kind for cell in audit.cells for each in cell.trainings}
    return [kind for kind in HEADS if kind in found]


def _table(audit: Audit) -> Iterator[str]:
    kinds = _kinds(audit)
    members = ("AUC", "TPR at 1 % FPR") if "texts" in kinds else ()
    names = (*(HEADS[kind] for kind in kinds), *members)
    yield row("mechanism", "claimed epsilon", *names, "verdict")
    yield "|---|" + "---:|" * (1 + len(names)) + "---|"
    for cell in audit.cells:
        bounds = {each.kind: _bound(each) for each in cell.trainings}
        attack = next((each.membership for each in cell.trainings if each.membership), None)
        yield row(
            cell.trainings[0].mechanism,
            _claim(cell.trainings),
            *(bounds.get(kind, DASH) for kind in kinds),
            *(_attack(attack) if members else ()),
            _verdict(cell),
        )


def _claim(trainings: list[Found]) -> str:
    """The two trainings of a budget may differ in their records, and so in the last digits."""
    claims = [each.claimed for each in trainings if each.claimed is not None]
    first = trainings[0]
    if not claims:
        return f"none (bounds at delta = {first.delta:.3g})"
    return (
        f"{max(claims):.3g} at delta = {first.delta:.3g} per {first.unit}, over all rounds and "
        "tasks"
    )


def _bound(found: Found) -> str:
    bound = found.bound
    return f"≥ {bound.epsilon:.2f} ({bound.correct} of {bound.guesses} right, m = {bound.canaries})"


def _attack(attack: Attack | None) -> tuple[str, str]:
    if attack is None:
        return DASH, DASH
    found = attack.true_positives
    rate = "fewer than 100 non-members" if found is None else _figure(found, 100, 1) + " %"
    return _figure(attack.auc, 1, 3), rate


def _figure(figure: Figure, scale: float, digits: int) -> str:
    value, low, high = (f"{scale * v:.{digits}f}" for v in (figure.value, figure.low, figure.high))
    return f"{value} [{low}, {high}]"


def _verdict(cell: Cell) -> str:
    if all(each.claimed is None for each in cell.trainings):
        return "nothing claimed"
    return "REFUTED" if any(each.refuted for each in cell.trainings) else "not refuted"
