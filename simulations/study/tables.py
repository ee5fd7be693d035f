"""The tables of a study. Accuracies in per cent, differences in points."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from statistics import fmean

from simulations.output import DASH, Table, duration, signed
from simulations.study.outcome import Outcome
from simulations.study.results import CellResult
from simulations.study.statistics import Estimate, estimate, paired_difference
from simulations.study.study_file import Study

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
Part = str | Table
"""A paragraph, or a table."""


def arms_table(study: Study, cells: Sequence[CellResult]) -> Table:
    """Return every arm's measures; first what the model knew before anything was learnt."""
    names = measures_of(cells)
    start = estimate(zero_shots(cells))
    rows = [("zero-shot (bound)", str(start.n), _accuracy(start), *[DASH] * (len(names) - 1))]
    found = {}
    for arm, own in by_arm(study, cells).items():
        found[len(rows)] = arm, [[MEASURES[m](cell.outcome) for cell in own] for m in names]
        figures = map(estimated, names, found[len(rows)][1])
        rows.append((study.label(arm), str(len(own)), *figures))
    caption = (
        "Arms and measures; accuracies in %, the others in points; the best contestant in bold"
    )
    return Table(caption, ("arm", "n", *names), tuple(rows), best=_best(study, names, found))


def _best(
    study: Study,
    names: Sequence[str],
    found: Mapping[int, tuple[str, Sequence[Sequence[float | None]]]],
) -> frozenset[tuple[int, int]]:
    """Return the cells of the best contestants, those alike as they are shown: ``found`` has arm
    and values of each row. Of forgetting less is better."""
    best = set()
    for place, name in enumerate(names):
        means = {
            row: round(fmean(value for value in values[place] if value is not None), 3)
            for row, (arm, values) in found.items()
            if study.file.arms[arm].contestant and any(v is not None for v in values[place])
        }
        choose = min if name == "forgetting" else max
        if len(means) > 1:
            top = choose(means.values())
            best |= {(row, place + 2) for row, mean in means.items() if mean == top}
    return frozenset(best)


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
            f"tests {_accuracy(everywhere)} %."
        )


def class_il_table(study: Study, cells: Sequence[CellResult]) -> Table:
    """Return the Class-IL measures of every arm that has counted them."""
    rows, found, names = list[tuple[str, ...]](), {}, CLASS_IL_MEASURES
    for arm, own in by_arm(study, cells).items():
        known = [each for c in own if (each := c.outcome.class_incremental) is not None]
        if known:
            values = [[getattr(each, name.replace(" ", "_")) for each in known] for name in names]
            found[len(rows)] = arm, values
            figures = map(estimated, names, values)
            rows.append((study.label(arm), str(len(known)), *figures))
    best = _best(study, names, found)
    return Table("Class-IL measures", ("arm", "n", *names), tuple(rows), best=best)


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
    form = _points if name.endswith("transfer") else _accuracy
    of_some = f" ({len(known)})" if len(known) < len(values) else ""
    return form(estimate(known)) + of_some


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
                figures = (str(found.n), _points(found), _p_value(found))
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
    over tasks (the older, the fewer) and cells. None: no arm learns one task after another."""
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
                    aged.setdefault(age, []).append(row[j])
        shown = (_percent(fmean(aged[age])) if age in aged else DASH for age in ages)
        rows.append((study.label(arm), *shown))
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
        figures = (_accuracy(found[top]), str(found[top].n), str(len(found)))
        best.append((study.label(arm), top, *figures))
        shown = (_accuracy(found[name]) if name in found else DASH for name in settings)
        every.append((study.label(arm), *shown))
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


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _accuracy(found: Estimate) -> str:
    return _percent(found.mean) + _half_width(found)


def _points(found: Estimate) -> str:
    return signed(found.mean) + _half_width(found)


def _half_width(found: Estimate) -> str:
    return "" if found.half_width is None else f" ± {100 * found.half_width:.1f}"


def _p_value(found: Estimate) -> str:
    if found.p_value is None:
        return DASH
    return "< 0.001" if found.p_value < 0.001 else f"{found.p_value:.3f}"
