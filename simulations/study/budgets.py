"""Accuracy against the privacy budget: what a study with ``epsilons`` shows beside other tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from server.results import Privacy, extent, rounded_up
from simulations.output import DASH, Table
from simulations.run.experiment import budget_setting, epsilons, named
from simulations.study.outcome import Outcome
from simulations.study.results import CellResult
from simulations.study.study_file import Study
from simulations.study.tables import CLASS_IL, MEASURES, TASK_IL, estimated

BUDGETS_EXPLAINED = (
    "Epsilon: the budget of a run. Gain retained: of the gain over zero-shot of the same seeds "
    "without privacy. Spent: the largest epsilon of a client's ledger in any seed, over all rounds "
    "and tasks."
)
MEANS_APART = (
    "Class means answer as well where there is no privacy, from class sums with less noise "
    '(method.prototype.enabled = "auto"): of the gain without privacy a part is theirs, and of '
    "what is lost a part is not that of the steps."
)
SHOWN = (TASK_IL, CLASS_IL, "forgetting", "worst client")


def by_epsilon(study: Study, cells: Sequence[CellResult]) -> dict[float, list[CellResult]]:
    """Return budget to the cells under it, the smallest first; infinity is without privacy."""
    settings = {epsilon: budget_setting(epsilon)[0] for epsilon in epsilons(study.file.epsilons)}
    found = {e: [c for c in cells if c.setting == name] for e, name in settings.items()}
    return {epsilon: own for epsilon, own in found.items() if own}


def budget_table(study: Study, label: str, cells: Sequence[CellResult]) -> Table:
    """Return the measures of one arm, of that label, under every budget."""
    rows = []
    under = by_epsilon(study, cells)
    free = {(c.seed, c.order): c.outcome for c in under.get(math.inf, [])}
    for epsilon, own in under.items():
        spent = [value for c in own if c.privacy for value in c.privacy.epsilon.values()]
        figures = (
            "inf (no privacy)" if math.isinf(epsilon) else named(epsilon),
            str(len(own)),
            *(estimated(name, [MEASURES[name](c.outcome) for c in own]) for name in SHOWN),
            estimated("share", [_gain(c.outcome, free.get((c.seed, c.order))) for c in own]),
            rounded_up(max(spent), 3) if spent else DASH,
        )
        rows.append(figures)
    columns = ("epsilon", "n", *SHOWN, "gain retained", "spent")
    return Table(f"{label} under each budget; accuracies in %", columns, tuple(rows))


def _gain(private: Outcome, free: Outcome | None) -> float | None:
    """Return the share of the gain retained (M37); None: there is nothing to compare with."""
    if free is None:
        return None
    start = fmean(free.zero_shot.values())
    best = free.average_accuracy - start
    return (private.average_accuracy - start) / best if best > 0 else None


def _class_means(cell: CellResult) -> bool:
    settings = next(iter(cell.settings.values()))
    means = settings.get("method.prototype.enabled") == "on"
    return means and settings.get("method.name", "deal") == "deal"


def _private(cells: Sequence[CellResult]) -> list[Privacy]:
    return [cell.privacy for cell in cells if cell.privacy and cell.privacy.epsilon]


def meanings(cells: Sequence[CellResult]) -> list[str]:
    """Return what the epsilons that one arm has spent mean, each meaning once, and what else its
    gain is due to."""
    texts = list(dict.fromkeys(map(_meaning, _private(cells))))
    apart = len({_class_means(cell) for cell in cells}) > 1
    return [*texts, MEANS_APART] if apart else texts


def _meaning(privacy: Privacy) -> str:
    seeded = "; simulation only: the noise came from a seed" if privacy.simulation_only else ""
    delta = rounded_up(privacy.delta or 0.0, 2)
    over = extent(privacy.disjoint_tasks)
    return (
        f"Spent: epsilon at delta = {delta} per {privacy.unit_text}, over {over}; "
        f"{privacy.trust}{seeded}."
    )


def sweep_text(cells: Sequence[CellResult]) -> str:
    """Return what the choice of a budget would cost, if it were made on real data."""
    private = _private(cells)
    if not private:
        return "No private run has finished: there is nothing to compose."
    epsilon = rounded_up(math.fsum(max(each.epsilon.values()) for each in private), 3)
    delta = rounded_up(math.fsum(each.delta or 0.0 for each in private), 3)
    text = (
        f"Every run is a release of its own. On the same real data the {len(private)} private runs "
        f"of this sweep would together spend at most epsilon = {epsilon} at delta = {delta} per "
        f"{private[0].unit_text}: what each spends, added up."
    )
    if free := len(cells) - len(private):
        text += (
            f" The {free} runs without privacy protect nothing: with them, no epsilon holds at all."
        )
    return f"{text} So choose a budget on public data."
