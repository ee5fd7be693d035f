"""The tables of a study. Accuracies in per cent, differences in points."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from statistics import fmean

from deal_core.config.run_config import Value
from simulations.output.files import DASH, TextTable, duration, signed
from simulations.run.run_folder import PRECISION
from simulations.study.outcome import Outcome
from simulations.study.results import CellResult, StudyResults
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
    "of them; one cell has no interval). It covers seeds and orders on these test rows, not which "
    "test rows there are."
)
CLASS_IL_EXPLAINED = (
    "Class-IL: average accuracy among the labels of all tasks; all else is among those of the task."
)
Part = str | TextTable
"""A paragraph, or a table."""


def make_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> TextTable:
    """Return a table whose first column has names and whose others have figures."""
    right = (False, *[True] * (len(columns) - 1))
    return TextTable(tuple(columns), right, tuple(map(tuple, rows)))


def precisions(results: StudyResults) -> Iterator[str]:
    """Yield in what the frozen model computed, and the seeds: pairs with a seed in common should
    have the precision in common, too."""
    seeds: dict[Value, set[int]] = {}
    for cell in results.standing:
        for run in cell.settings.values():
            seeds.setdefault({**results.defaults, **run}[PRECISION], set()).add(cell.seed)
    if seeds:
        parts = (f"{name} (seeds {sorted(own)})" for name, own in seeds.items())
        yield f"Frozen model: {'; '.join(parts)}."


def arms_table(study: Study, cells: Sequence[CellResult]) -> TextTable:
    """Return every arm's measures; first what the model knew before anything was learnt."""
    names = measures_of(cells)
    start = estimate(zero_shots(cells))
    rows = [["zero-shot (bound)", str(start.n), _accuracy(start), *[DASH] * (len(names) - 1)]]
    for arm, own in by_arm(study, cells).items():
        figures = (estimated(m, [MEASURES[m](cell.outcome) for cell in own]) for m in names)
        rows.append([study.label(arm), str(len(own)), *figures])
    return make_table(("arm", "n", *names), rows)


def on_all_tests(study: Study, cells: Sequence[CellResult]) -> Iterator[str]:
    """Yield what each client's own model does on everybody's tests, of arms of such models."""
    alone = [c for c in cells if c.outcome.on_all_tests is not None]
    for arm, own in by_arm(study, alone).items():
        everywhere = estimate([c.outcome.on_all_tests or 0.0 for c in own])
        yield (
            f"{study.label(arm)}: above, each client's model on its own tests; on everybody's "
            f"tests {_accuracy(everywhere)} %."
        )


def class_il_table(study: Study, cells: Sequence[CellResult]) -> TextTable:
    """Return the Class-IL measures of every arm that has counted them."""
    rows = []
    for arm, own in by_arm(study, cells).items():
        known = [found for c in own if (found := c.outcome.class_incremental) is not None]
        if known:
            figures = (
                estimated(name, [getattr(each, name.replace(" ", "_")) for each in known])
                for name in CLASS_IL_MEASURES
            )
            rows.append([study.label(arm), str(len(known)), *figures])
    return make_table(("arm", "n", *CLASS_IL_MEASURES), rows)


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
    named = (best, study.file.baseline, study.file.candidate)
    against = [arm for arm in dict.fromkeys(named) if arm in accuracy]
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
                rows.append((study.label(arm), study.label(other), *figures))
    yield make_table(("arm", "minus", "pairs", "difference", "p"), rows)
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


def age_table(study: Study, cells: Sequence[CellResult]) -> TextTable | None:
    """Return accuracy on a task when it has just been learnt, and one, two, ... tasks later: means
    over tasks (the older, the fewer) and cells. None: no arm learns one task after another."""
    streams = [cell for cell in cells if len(cell.outcome.accuracy_matrix) > 1]
    if not streams:
        return None
    ages = range(max(len(cell.outcome.accuracy_matrix) for cell in streams))
    columns = ["tasks learnt since", *(f"+{age}" if age else "0" for age in ages)]
    arms = by_arm(study, streams).items()
    return make_table(
        columns, ([study.label(arm), *(_aged(own, age) for age in ages)] for arm, own in arms)
    )


def _aged(cells: Sequence[CellResult], age: int) -> str:
    values = [
        found.accuracy_matrix[i + age][j]
        for found in (cell.outcome for cell in cells)
        for j, i in enumerate(found.learnt)
        if i + age < len(found.accuracy_matrix)
    ]
    return _percent(fmean(values)) if values else DASH


def cost_table(study: Study, cells: Sequence[CellResult]) -> TextTable:
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
    return make_table(
        ("arm", "time", "peak memory", "sent per client", "received per client"), rows
    )


def setting_table(study: Study, cells: Sequence[CellResult]) -> TextTable:
    """Return Task-IL accuracy of every arm under every setting."""
    settings = list(study.file.settings)
    rows = []
    for arm, own in by_setting(study, cells).items():
        figures = (_accuracy(own[setting]) if setting in own else DASH for setting in settings)
        rows.append([study.label(arm), *figures])
    return make_table(("arm", *settings), rows)


def best_settings(study: Study, cells: Sequence[CellResult]) -> TextTable:
    """Return the setting under which each arm has its highest Task-IL accuracy."""
    rows = []
    for arm, own in by_setting(study, cells).items():
        best = max(own, key=lambda setting: own[setting].mean)
        figures = (_accuracy(own[best]), str(own[best].n), str(len(own)))
        rows.append((study.label(arm), best, *figures))
    return make_table(("arm", "setting", TASK_IL, "n", "settings tried"), rows)


def by_setting(study: Study, cells: Sequence[CellResult]) -> dict[str, dict[str, Estimate]]:
    """Return arm and setting to Task-IL accuracy; what has no cell is not in it."""
    return {
        arm: {
            setting: estimate([c.outcome.average_accuracy for c in own if c.setting == setting])
            for setting in study.file.settings
            if any(c.setting == setting for c in own)
        }
        for arm, own in by_arm(study, cells).items()
    }


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
