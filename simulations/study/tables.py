"""The tables of a study. Accuracies in per cent, differences in points."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from statistics import fmean

from deal_core.config.run_config import Value
from simulations.output.files import DASH, duration, head, row, signed
from simulations.run.run_folder import PRECISION
from simulations.study.outcome import AmongAll, Outcome
from simulations.study.results import CellResult, StudyResults
from simulations.study.statistics import Estimate, estimate, paired_difference
from simulations.study.study_file import Study

Measure = Callable[[Outcome], float | None]
AVERAGE_ACCURACY = "average accuracy"
ALL_LABELS = "all labels"
ALL_LABELS_EXPLAINED = (
    " All labels: average accuracy among the labels of all tasks, the task not told; all else is "
    "among those of the task."
)
"""Only where some cell has counted that: older results have not."""
MEASURES: dict[str, Measure] = {
    AVERAGE_ACCURACY: lambda o: o.average_accuracy,
    ALL_LABELS: lambda o: o.among_all_labels,
    "backward transfer": lambda o: o.backward_transfer,
    "forward transfer": lambda o: o.forward_transfer,
    "forgetting": lambda o: o.forgetting,
    "learning accuracy": lambda o: o.learning_accuracy,
    "worst client": lambda o: o.worst_client,
}
"""Column to figure."""
AMONG_ALL: dict[str, Callable[[AmongAll], float | None]] = {
    AVERAGE_ACCURACY: lambda found: found.average_accuracy,
    "backward transfer": lambda found: found.backward_transfer,
    "forgetting": lambda found: found.forgetting,
    "worst client": lambda found: found.worst_client,
}
"""The same of what is counted among all labels; a cell from before some of it was kept has none.
Forward transfer is not there: before its turn a task competes with more labels than before any."""
EXPLANATION = (
    "Accuracies in %, transfer and forgetting in points: mean ± half width of the 95 % interval "
    "(Student's t over the n cells of different seed or order; a number in brackets: over so many "
    "of them; one cell has no interval). It covers seeds and orders on these test rows, not which "
    "test rows there are."
)


def precisions(results: StudyResults) -> Iterator[str]:
    """Yield in what the frozen model computed, and the seeds: pairs with a seed in common should
    have the precision in common, too."""
    seeds: dict[Value, set[int]] = {}
    for cell in results.cells:
        for run in cell.settings.values():
            seeds.setdefault({**results.defaults, **run}[PRECISION], set()).add(cell.seed)
    if seeds:
        parts = (f"{name} (seeds {sorted(own)})" for name, own in seeds.items())
        yield f"Frozen model: {'; '.join(parts)}."


def arms_table(study: Study, cells: Sequence[CellResult]) -> Iterator[str]:
    """Yield every arm's measures; first what the model knew before anything was learnt."""
    names = measures_of(cells)
    yield from head("arm", "n", *names)
    start = estimate(zero_shots(cells))
    yield row("zero-shot (bound)", str(start.n), _accuracy(start), *[DASH] * (len(names) - 1))
    for arm, own in by_arm(study, cells).items():
        yield row(study.label(arm), str(len(own)), *(_measure(own, m) for m in names))
    alone = [c for c in cells if c.outcome.on_all_tests is not None]
    for arm, own in by_arm(study, alone).items():
        everywhere = estimate([c.outcome.on_all_tests or 0.0 for c in own])
        yield ""
        yield (
            f"{study.label(arm)}: above, each client's model on its own tests; on everybody's "
            f"tests {_accuracy(everywhere)} %."
        )


def all_labels_table(study: Study, cells: Sequence[CellResult]) -> Iterator[str]:
    """Yield the measures among all labels of every arm that has counted them."""
    yield from head("arm", "n", *AMONG_ALL)
    for arm, own in by_arm(study, cells).items():
        found = [c.outcome.class_incremental for c in own]
        known = [each for each in found if each is not None]
        if known:
            values = ([measure(each) for each in known] for measure in AMONG_ALL.values())
            cells_of = map(estimated, AMONG_ALL, values)
            yield row(study.label(arm), str(len(known)), *cells_of)


def measures_of(cells: Sequence[CellResult]) -> list[str]:
    """The measures that some cell has: all but, in older results, that among all labels."""
    known = any(cell.outcome.class_incremental is not None for cell in cells)
    return [name for name in MEASURES if known or name != ALL_LABELS]


def zero_shots(cells: Sequence[CellResult]) -> list[float]:
    """Return the mean accuracy before anything was learnt, once for every seed and set of tasks:
    its cells have the same texts and the same model."""
    found: dict[object, float] = {}
    for cell in cells:
        start = cell.outcome.zero_shot
        found.setdefault((cell.seed, tuple(sorted(start))), fmean(start.values()))
    return list(found.values())


def _measure(cells: Sequence[CellResult], name: str) -> str:
    return estimated(name, [MEASURES[name](cell.outcome) for cell in cells])


def estimated(name: str, values: Sequence[float | None]) -> str:
    """Return mean and interval of a measure, of the values that are known, and how many are."""
    known = [value for value in values if value is not None]
    if not known:
        return DASH
    form = _points if name.endswith("transfer") else _accuracy
    of_some = f" ({len(known)})" if len(known) < len(values) else ""
    return form(estimate(known)) + of_some


def significance(
    study: Study, cells: Sequence[CellResult], name: str = AVERAGE_ACCURACY
) -> Iterator[str]:
    """Yield paired differences in a measure, of every arm that is no bound to the best baseline,
    the named one and the candidate. A reference is compared, and is never the best baseline."""
    arms, measure = study.file.arms, MEASURES[name]
    known = [cell for cell in cells if measure(cell.outcome) is not None]
    accuracy = {
        arm: {pair(c): measure(c.outcome) or 0.0 for c in own}
        for arm, own in by_arm(study, known).items()
        if not arms[arm].bound
    }
    baselines = baselines_of(study, {a: own for a, own in accuracy.items() if arms[a].contestant})
    best = best_of(baselines)
    named = (best, study.file.baseline, study.file.candidate)
    against = [arm for arm in dict.fromkeys(named) if arm in accuracy]
    if len(accuracy) < 2 or not against:
        yield "One arm alone: nothing to compare."
        return
    shared = shared_by(baselines)
    by = "the cells that all have in common" if shared else "each one's own cells"
    yield (
        f"Pairs have seed, order and precision in common. The best baseline, by {by}, is "
        f"{study.label(best)}; that is a choice by the very figures."
    )
    yield ""
    yield from head("arm", "minus", "pairs", "difference", "p")
    compared: set[str] = set()
    for arm, ours in accuracy.items():
        for other in against:
            difference = paired_difference(ours, accuracy[other]) if other != arm else None
            if difference is not None:
                compared |= {arm, other}
                figures = (str(difference.n), _points(difference), _p_value(difference))
                yield row(study.label(arm), study.label(other), *figures)
    alone = [study.label(arm) for arm in accuracy if arm not in compared]
    if alone:
        yield ""
        yield f"Not compared, for want of a pair: {', '.join(alone)}."


def baselines_of(
    study: Study, accuracy: dict[str, dict[Hashable, float]]
) -> dict[str, dict[Hashable, float]]:
    """Return all arms but the candidate; that too where it is alone."""
    others = {arm: own for arm, own in accuracy.items() if arm != study.file.candidate}
    return others or accuracy


def shared_by(accuracy: Mapping[str, Mapping[Hashable, float]]) -> set[Hashable]:
    """Return the cells that all arms have."""
    return set.intersection(*map(set, accuracy.values())) if accuracy else set()


def best_of(accuracy: Mapping[str, Mapping[Hashable, float]]) -> str:
    """Return the arm of the highest mean over the cells that all arms have; over their own where
    they have none in common; empty: there is no arm."""
    shared = shared_by(accuracy)

    def mean(arm: str) -> float:
        return fmean(value for key, value in accuracy[arm].items() if not shared or key in shared)

    return max(accuracy, key=mean, default="")


def age_table(study: Study, cells: Sequence[CellResult]) -> Iterator[str]:
    """Yield accuracy on a task when it has just been learnt, and one, two, ... tasks later: means
    over tasks (the older, the fewer) and cells."""
    streams = [cell for cell in cells if len(cell.outcome.accuracy_matrix) > 1]
    if not streams:
        yield "No arm has learnt one task after another."
        return
    longest = max(len(cell.outcome.accuracy_matrix) for cell in streams)
    yield from head("tasks learnt since", "0", *(f"+{age}" for age in range(1, longest)))
    for arm, own in by_arm(study, streams).items():
        yield row(study.label(arm), *(_aged(own, age) for age in range(longest)))


def _aged(cells: Sequence[CellResult], age: int) -> str:
    values = [
        found.accuracy_matrix[i + age][j]
        for found in (cell.outcome for cell in cells)
        for j, i in enumerate(found.learnt)
        if i + age < len(found.accuracy_matrix)
    ]
    return _percent(fmean(values)) if values else DASH


def cost_table(study: Study, cells: Sequence[CellResult]) -> Iterator[str]:
    """Yield means per cell, and the largest peak; what runs beside it on the machine is in the
    time."""
    yield from head("arm", "time", "peak memory", "sent per client", "received per client")
    for arm, own in by_arm(study, cells).items():
        outcomes = [cell.outcome for cell in own]
        yield row(
            study.label(arm),
            duration(fmean(o.seconds for o in outcomes)),
            f"{max(o.peak_rss_bytes for o in outcomes) / 1e6:.0f} MB",
            f"{fmean(o.bytes_up for o in outcomes) / 1e6:.1f} MB",
            f"{fmean(o.bytes_down for o in outcomes) / 1e6:.1f} MB",
        )


def setting_table(study: Study, cells: Sequence[CellResult]) -> Iterator[str]:
    """Yield average accuracy of every arm under every setting."""
    settings, under = list(study.file.settings), by_setting(study, cells)
    yield from head("arm", *settings)
    for arm in by_arm(study, cells):
        found = (under.get((arm, setting)) for setting in settings)
        yield row(study.label(arm), *(_accuracy(e) if e else DASH for e in found))


def best_settings(study: Study, cells: Sequence[CellResult]) -> Iterator[str]:
    """Yield the setting under which each arm has its highest average accuracy."""
    under = by_setting(study, cells)
    yield from head("arm", "setting", "average accuracy", "n", "settings tried")
    for arm, setting in best_setting(study, cells).items():
        found, tried = under[arm, setting], sum(own == arm for own, _ in under)
        yield row(study.label(arm), setting, _accuracy(found), str(found.n), str(tried))


def best_setting(study: Study, cells: Sequence[CellResult]) -> dict[str, str]:
    """Return every arm's setting of the highest average accuracy."""
    best: dict[str, str] = {}
    under = by_setting(study, cells)
    for arm, setting in under:
        if arm not in best or under[arm, setting].mean > under[arm, best[arm]].mean:
            best[arm] = setting
    return best


def by_setting(study: Study, cells: Sequence[CellResult]) -> dict[tuple[str, str], Estimate]:
    """Return arm and setting to average accuracy; what has no cell is not in it."""
    return {
        (arm, setting): estimate([c.outcome.average_accuracy for c in own if c.setting == setting])
        for arm, own in by_arm(study, cells).items()
        for setting in study.file.settings
        if any(c.setting == setting for c in own)
    }


def by_arm(study: Study, cells: Sequence[CellResult]) -> dict[str, list[CellResult]]:
    """Arm to its cells, in the study's order; an arm without a cell is not in it."""
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
