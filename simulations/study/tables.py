"""The tables of a study, and what a study with ``epsilons`` shows of accuracy against the privacy
budget. Accuracies in per cent, differences in points."""

import json
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from statistics import fmean

from server.results import Privacy, extent, rounded_up
from simulations.output import DASH, Table, duration, percent, signed
from simulations.run.experiment import budget_setting, epsilons, named
from simulations.study.grid import Study
from simulations.study.outcome import Outcome
from simulations.study.results import CellResult
from simulations.study.statistics import Estimate, estimate, paired_difference

TASK_IL = "Task-IL accuracy"
CLASS_IL = "Class-IL accuracy"
MEASURES: dict[str, Callable[[Outcome], float | None]] = {
    TASK_IL: lambda o: o.average_accuracy,
    CLASS_IL: lambda o: o.class_incremental.average_accuracy if o.class_incremental else None,
    "backward transfer": lambda o: o.backward_transfer,
    "forward transfer": lambda o: o.forward_transfer,
    "forgetting": lambda o: o.forgetting,
    "learning accuracy": lambda o: o.learning_accuracy,
    "worst client": lambda o: o.worst_client,
}
"""Column to figure."""
CLASS_IL_MEASURES = ("average accuracy", "backward transfer", "forgetting", "worst client")
"""Columns of the Class-IL table. Without forward transfer: before its turn a task competes with
more labels than before any."""
EXPLANATION = (
    "Accuracies in %, transfer and forgetting in points: mean ± half width of the 95 % interval "
    "(Student's t over the n cells of different seed or order; a number in brackets: over so many "
    "of them; one cell, or equal ones, have no interval). It covers seeds and orders on these test "
    "rows, not which test rows there are."
)
CLASS_IL_EXPLAINED = (
    "Class-IL: average accuracy among the labels of all tasks; all else is among those of the task."
)
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
BUDGET_MEASURES = (TASK_IL, CLASS_IL, "forgetting", "worst client")
"""Columns of a table of budgets."""
Part = str | Table
"""A paragraph, or a table."""


def arms_table(study: Study, cells: Sequence[CellResult]) -> Table:
    """Return every arm's measures; first what the model knew before anything was learnt."""
    names = measures_of(cells)
    start = estimate(zero_shots(cells))
    first = ("zero-shot (bound)", str(start.n), shown(start), *[DASH] * (len(names) - 1))
    values = {
        arm: [[MEASURES[name](cell.outcome) for cell in own] for name in names]
        for arm, own in by_arm(study, cells).items()
    }
    caption = (
        "Arms and measures; accuracies in %, the others in points; the best contestant in bold"
    )
    return _of_arms(study, caption, names, values, first)


def class_il_table(study: Study, cells: Sequence[CellResult]) -> Table:
    """Return the Class-IL measures of every arm that has counted them."""
    values = {}
    for arm, own in by_arm(study, cells).items():
        known = [each for c in own if (each := c.outcome.class_incremental) is not None]
        if known:
            names = (name.replace(" ", "_") for name in CLASS_IL_MEASURES)
            values[arm] = [[getattr(each, name) for each in known] for name in names]
    return _of_arms(study, "Class-IL measures", CLASS_IL_MEASURES, values)


def _of_arms(
    study: Study,
    caption: str,
    names: Sequence[str],
    values: Mapping[str, Sequence[Sequence[float | None]]],
    *first: tuple[str, ...],
) -> Table:
    """Return a row for each arm, of its values of every measure. The best contestants, those alike
    as they are shown, are marked; of forgetting less is better."""
    rows = [*first]
    for arm, own in values.items():
        rows.append((study.label(arm), str(len(own[0])), *map(estimated, names, own)))
    best = set()
    for place, name in enumerate(names):
        means = {
            row: round(fmean(known), 3)
            for row, (arm, own) in enumerate(values.items(), start=len(first))
            if study.file.arms[arm].contestant
            and (known := [value for value in own[place] if value is not None])
        }
        top = (min if name == "forgetting" else max)(means.values(), default=None)
        best |= {(row, place + 2) for row, mean in means.items() if mean == top and len(means) > 1}
    return Table(caption, ("arm", "n", *names), tuple(rows), best=frozenset(best))


def mixed_measures(cells: Sequence[CellResult]) -> str:
    """Return what accuracy is where answers of some tasks are texts; empty: none are."""
    for settings in (own for cell in cells for own in cell.settings.values()):
        if tasks := json.loads(str(settings.get("data.generation", "[]"))):
            return (
                f"Answers are texts in: {', '.join(tasks)}. Their figures are shares of overlap "
                "with right texts, not of right answers; means over tasks mix both."
            )
    return ""


def on_all_tests(study: Study, cells: Sequence[CellResult]) -> Iterator[str]:
    """Yield what each client's own model does on everybody's tests, of arms of such models."""
    alone = [c for c in cells if c.outcome.on_all_tests is not None]
    for arm, own in by_arm(study, alone).items():
        everywhere = estimate([c.outcome.on_all_tests or 0.0 for c in own])
        yield (
            f"{study.label(arm)}: above, each client's model on its own tests; on everybody's "
            f"tests {shown(everywhere)} %."
        )


def measures_of(cells: Sequence[CellResult]) -> list[str]:
    """Return the measures that some cell has: all, or all but Class-IL accuracy."""
    known = any(cell.outcome.class_incremental is not None for cell in cells)
    return [name for name in MEASURES if known or name != CLASS_IL]


def zero_shots(cells: Sequence[CellResult]) -> list[float]:
    """Return the mean accuracy before anything was learnt, once for every seed and set of tasks:
    its cells have the same texts and the same model."""
    found: dict[object, float] = {}
    for cell in cells:
        start = cell.outcome.zero_shot
        found.setdefault((cell.seed, tuple(sorted(start))), fmean(start.values()))
    return list(found.values())


def estimated(name: str, values: Sequence[float | None]) -> str:
    """Return mean and interval of a measure, of the values that are known, and how many are."""
    known = [value for value in values if value is not None]
    if not known:
        return DASH
    of_some = f" ({len(known)})" if len(known) < len(values) else ""
    return shown(estimate(known), signed if name.endswith("transfer") else percent) + of_some


def significance(study: Study, cells: Sequence[CellResult], name: str = TASK_IL) -> Iterator[Part]:
    """Yield paired differences in a measure, of every arm that is no bound to the best baseline,
    the named one and the candidate. A reference is compared, and is never the best baseline."""
    arms, measure = study.file.arms, MEASURES[name]
    known = [cell for cell in cells if measure(cell.outcome) is not None]
    accuracy = {
        arm: {pair(c): measure(c.outcome) or 0.0 for c in own}
        for arm, own in by_arm(study, known).items()
        if not arms[arm].bound
    }
    contestants = {arm: own for arm, own in accuracy.items() if arms[arm].contestant}
    others = {arm: own for arm, own in contestants.items() if arm != study.file.candidate}
    best, shared = best_of(others or contestants)
    roles = {
        "best baseline": best,
        "baseline": study.file.baseline,
        "candidate": study.file.candidate,
    }
    against = [arm for arm in dict.fromkeys(roles.values()) if arm in accuracy]
    if len(accuracy) < 2 or not against:
        yield "One arm alone: nothing to compare."
        return
    by = "the cells that all have in common" if shared else "each one's own cells"
    yield (
        f"Pairs have seed, order and precision in common. The best baseline, by {by}, is "
        f"{study.label(best)}; that is a choice by the very figures."
    )
    rows, compared = [], set[str]()
    for arm, ours in accuracy.items():
        for other in against:
            found = paired_difference(ours, accuracy[other]) if other != arm else None
            if found is not None:
                compared |= {arm, other}
                p = found.p_value
                chance = DASH if p is None else f"{p:.3f}" if p >= 0.001 else "< 0.001"
                figures = (str(found.n), shown(found, signed), chance)
                role = ", ".join(name for name, own in roles.items() if own == other)
                rows.append((study.label(arm), f"{study.label(other)}: {role}", *figures))
    caption = f"Paired differences in {name}, in points"
    yield Table(caption, ("arm", "minus", "pairs", "difference", "p"), tuple(rows))
    alone = [study.label(arm) for arm in accuracy if arm not in compared]
    if alone:
        yield f"Not compared, for want of a pair: {', '.join(alone)}."


def best_of(accuracy: Mapping[str, Mapping[Hashable, float]]) -> tuple[str, bool]:
    """Return the arm of the highest mean over the cells that all arms have, and whether there are
    such cells: otherwise each arm counts by its own. Empty: there is no arm."""
    shared = set.intersection(*map(set, accuracy.values())) if accuracy else set()

    def mean(arm: str) -> float:
        return fmean(value for key, value in accuracy[arm].items() if not shared or key in shared)

    return max(accuracy, key=mean, default=""), bool(shared)


def age_table(study: Study, cells: Sequence[CellResult]) -> Table | None:
    """Return accuracy on a task when it has just been learnt, and one, two, ... tasks later: means
    over tasks (the older, the fewer; those that were evaluated then) and cells. None: no arm learns
    one task after another."""
    streams = [cell for cell in cells if len(cell.outcome.accuracy_matrix) > 1]
    if not streams:
        return None
    ages = range(max(len(cell.outcome.accuracy_matrix) for cell in streams))
    rows = []
    for arm, own in by_arm(study, streams).items():
        aged: dict[int, list[float]] = {}
        for found in (cell.outcome for cell in own):
            for j, learnt in enumerate(found.learnt):
                for age, row in enumerate(found.accuracy_matrix[learnt:]):
                    if (value := row[j]) is not None:
                        aged.setdefault(age, []).append(value)
        means = (percent(fmean(aged[age]) if age in aged else None) for age in ages)
        rows.append((study.label(arm), *means))
    caption = "Accuracy on a task by the tasks learnt since, in %"
    columns = ("tasks learnt since", "0", *(f"+{age}" for age in ages[1:]))
    return Table(caption, columns, tuple(rows))


def cost_table(study: Study, cells: Sequence[CellResult]) -> Table:
    """Return means per cell, and the largest peak; what runs beside it on the machine is in the
    time."""
    rows = []
    for arm, own in by_arm(study, cells).items():
        outcomes = [cell.outcome for cell in own]
        figures = (
            duration(fmean(o.seconds for o in outcomes)),
            f"{max(o.peak_rss_bytes for o in outcomes) / 1e6:.0f} MB",
            f"{fmean(o.bytes_up for o in outcomes) / 1e6:.1f} MB",
            f"{fmean(o.bytes_down for o in outcomes) / 1e6:.1f} MB",
        )
        rows.append((study.label(arm), *figures))
    caption = "Means per cell; the largest peak of memory"
    columns = ("arm", "time", "peak memory", "sent per client", "received per client")
    return Table(caption, columns, tuple(rows))


def setting_tables(study: Study, cells: Sequence[CellResult]) -> tuple[Table, Table]:
    """Return the setting under which each arm has its highest Task-IL accuracy; and that accuracy
    of every arm under every setting."""
    settings = list(study.file.settings)
    best, every = [], []
    for arm, own in by_arm(study, cells).items():
        reached: dict[str, list[float]] = {}
        for cell in own:
            reached.setdefault(cell.setting, []).append(cell.outcome.average_accuracy)
        found = {name: estimate(reached[name]) for name in settings if name in reached}
        top = max(found, key=lambda name: found[name].mean)
        figures = (shown(found[top]), str(found[top].n), str(len(found)))
        best.append((study.label(arm), top, *figures))
        means = (shown(found[name]) if name in found else DASH for name in settings)
        every.append((study.label(arm), *means))
    columns = ("arm", "setting", TASK_IL, "n", "settings tried")
    return (
        Table("Best setting of every arm", columns, tuple(best)),
        Table(f"{TASK_IL} in %", ("arm", *settings), tuple(every)),
    )


def by_arm(study: Study, cells: Sequence[CellResult]) -> dict[str, list[CellResult]]:
    """Return arm to its cells, in the study's order; an arm without a cell is not in it."""
    own = {arm: [cell for cell in cells if cell.arm == arm] for arm in study.file.arms}
    return {arm: found for arm, found in own.items() if found}


def pair(cell: CellResult) -> Hashable:
    """Return what two cells must have in common to be a pair."""
    return (cell.seed, cell.order, cell.precision)


def shown(found: Estimate, form: Callable[[float], str] = percent) -> str:
    """Return a mean, and half the width of its interval where it has one."""
    half = "" if found.half_width is None else f" ± {100 * found.half_width:.1f}"
    return form(found.mean) + half


def by_epsilon(study: Study, cells: Sequence[CellResult]) -> dict[float, list[CellResult]]:
    """Return budget to the cells under it, the smallest first; infinity is without privacy."""
    settings = {epsilon: budget_setting(epsilon)[0] for epsilon in epsilons(study.file.epsilons)}
    found = {e: [c for c in cells if c.setting == name] for e, name in settings.items()}
    return {epsilon: own for epsilon, own in found.items() if own}


def budget_table(study: Study, arm: str, cells: Sequence[CellResult]) -> Table:
    """Return the measures of one arm under every budget."""
    rows = []
    under = by_epsilon(study, cells)
    free = {(c.seed, c.order): c.outcome for c in under.get(math.inf, [])}
    for epsilon, own in under.items():
        spent = [value for c in own if c.privacy for value in c.privacy.epsilon.values()]
        figures = (
            "inf (no privacy)" if math.isinf(epsilon) else named(epsilon),
            str(len(own)),
            *(
                estimated(name, [MEASURES[name](c.outcome) for c in own])
                for name in BUDGET_MEASURES
            ),
            estimated("share", [_gain(c.outcome, free.get((c.seed, c.order))) for c in own]),
            rounded_up(max(spent), 3) if spent else DASH,
        )
        rows.append(figures)
    columns = ("epsilon", "n", *BUDGET_MEASURES, "gain retained", "spent")
    caption = f"{study.label(arm)} under each budget; accuracies in %"
    return Table(caption, columns, tuple(rows))


def _gain(private: Outcome, free: Outcome | None) -> float | None:
    """Return the share of the gain retained (M37); None: there is nothing to compare with."""
    if free is None:
        return None
    start = fmean(free.zero_shot.values())
    best = free.average_accuracy - start
    return (private.average_accuracy - start) / best if best > 0 else None


def _private(cells: Sequence[CellResult]) -> list[Privacy]:
    return [cell.privacy for cell in cells if cell.privacy and cell.privacy.epsilon]


def meanings(cells: Sequence[CellResult]) -> list[str]:
    """Return what the epsilons that one arm has spent mean, each meaning once, and what else its
    gain is due to."""
    texts = []
    for privacy in _private(cells):
        seeded = "; simulation only: the noise came from a seed" if privacy.simulation_only else ""
        texts.append(
            f"Spent: epsilon at delta = {rounded_up(privacy.delta or 0.0, 2)} per "
            f"{privacy.unit_text}, over {extent(privacy.disjoint_tasks)}; {privacy.trust}{seeded}."
        )
    settings = [next(iter(cell.settings.values())) for cell in cells]
    deal = (own.get("method.name", "deal") == "deal" for own in settings)
    means = (own.get("method.prototype.enabled") == "on" for own in settings)
    apart = len(set(map(all, zip(deal, means, strict=True)))) > 1
    return [*dict.fromkeys(texts), *[MEANS_APART] * apart]


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
