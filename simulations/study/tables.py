"""``study.md``: the tables of a study. Accuracies in per cent, differences in points."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from statistics import fmean

from deal_core.config.run_config import Value
from simulations.output.files import DASH, head, row
from simulations.run.live_view import duration, signed
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


def markdown(study: Study, results: StudyResults) -> str:
    """Return the whole page."""
    more = ALL_LABELS_EXPLAINED if ALL_LABELS in measures_of(results.cells) else ""
    lines = [f"# Study {study.name}", "", study.file.description, ""]
    lines += [f"{len(results.cells)} of {results.wanted} cells done. {EXPLANATION}{more}", ""]
    lines += [*precisions(results), ""]
    settings = list(study.file.settings)
    if len(settings) > 1:
        lines += list(_settings(study, results.cells))
    for setting in settings or [""]:
        cells = [cell for cell in results.cells if cell.setting == setting]
        if cells:
            lines += list(_section(study, setting, cells))
    return "\n".join(lines).rstrip() + "\n"


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


def _section(study: Study, setting: str, cells: Sequence[CellResult]) -> Iterator[str]:
    if setting:
        yield from (f"## Setting {setting}", "")
    level = "###" if setting else "##"
    yield from (f"{level} Arms", "", *arms_table(study, cells), "")
    yield from (f"{level} Differences in average accuracy", "", *significance(study, cells), "")
    if ALL_LABELS in measures_of(cells):
        yield from (f"{level} Among all labels", "", *all_labels_table(study, cells), "")
        among_all = significance(study, cells, ALL_LABELS)
        yield from (f"{level} Differences among all labels", "", *among_all, "")
    yield from (f"{level} Forgetting", "", *age_table(study, cells), "")
    yield from curves(study, cells, level + "#")
    yield from (f"{level} Cost", "", *cost_table(study, cells), "")


def arms_table(study: Study, cells: Sequence[CellResult]) -> Iterator[str]:
    """Yield every arm's measures; first what the model knew before anything was learnt."""
    names = measures_of(cells)
    yield from head("arm", "n", *names)
    starts = zero_shots(cells)
    start = estimate([fmean(values) for own in starts.values() for values, _ in own])
    yield row("zero-shot (bound)", str(start.n), _accuracy(start), *[DASH] * (len(names) - 1))
    for arm, own in by_arm(study, cells).items():
        yield row(study.label(arm), str(len(own)), *(_measure(own, m) for m in names))
    if any(len(own) > 1 for own in starts.values()):
        yield ""
        yield disagreement(starts)
    alone = [c for c in cells if c.outcome.on_all_tests is not None]
    for arm, own in by_arm(study, alone).items():
        everywhere = estimate([c.outcome.on_all_tests or 0.0 for c in own])
        yield ""
        yield (
            f"{study.label(arm)}: above, each client's model on its own tests; on everybody's "
            f"tests {_accuracy(everywhere)} %."
        )
    for group in equally_accurate(study, cells):
        yield ""
        yield (
            f"The same accuracies in the same cells: {', '.join(group)}. To accuracy, what their "
            "settings differ in made no difference."
        )


def all_labels_table(study: Study, cells: Sequence[CellResult]) -> Iterator[str]:
    """Yield the measures among all labels of every arm that has counted them."""
    yield from head("arm", "n", *AMONG_ALL)
    for arm, own in by_arm(study, cells).items():
        found = [c.outcome.class_incremental for c in own]
        known = [each for each in found if each is not None]
        if known:
            values = ([measure(each) for each in known] for measure in AMONG_ALL.values())
            cells_of = map(_estimated, AMONG_ALL, values)
            yield row(study.label(arm), str(len(known)), *cells_of)


def measures_of(cells: Sequence[CellResult]) -> list[str]:
    """The measures that some cell has: all but, in older results, that among all labels."""
    known = any(cell.outcome.class_incremental is not None for cell in cells)
    return [name for name in MEASURES if known or name != ALL_LABELS]


ZeroShots = dict[tuple[int, tuple[str, ...]], Counter[tuple[tuple[float, ...], Value]]]
"""Seed and tasks to what was found there (accuracy on each task, precision), and by how many
cells."""


def zero_shots(cells: Sequence[CellResult]) -> ZeroShots:
    """Return what the cells of every seed found before anything was learnt, in whatever order they
    were to learn. They have the same texts and the same model, so a second value is due to rounding
    (docs/studies.md)."""
    found: ZeroShots = {}
    for cell in cells:
        tasks = tuple(sorted(cell.outcome.zero_shot))
        # A bound of several runs is summed otherwise: its last bits are no disagreement.
        values = tuple(round(cell.outcome.zero_shot[task], 9) for task in tasks)
        found.setdefault((cell.seed, tasks), Counter())[values, cell.precision] += 1
    return {place: found[place] for place in sorted(found)}


def disagreement(starts: ZeroShots) -> str:
    """Return the line on the seeds whose cells do not all have the same accuracies."""
    several = {place: own for place, own in starts.items() if len(own) > 1}
    mixed = len({precision for own in several.values() for _, precision in own}) > 1
    parts = []
    for (seed, _), own in several.items():
        each = []
        for (values, precision), count in sorted(own.items(), key=repr):
            cells = f"{count} cell{'s' if count > 1 else ''}"
            each.append(f"{_percent(fmean(values))} ({cells}{f', {precision}' if mixed else ''})")
        tasks = zip(*(values for values, _ in own), strict=True)
        apart = 100 * max(max(task) - min(task) for task in tasks)
        parts.append(f"seed {seed}: {', '.join(each)}, on a single task {apart:.1f} points apart")
    told = "; ".join(parts)
    return (
        "Cells of one seed disagree on zero-shot; each value counts once above. "
        f"{told[0].upper()}{told[1:]}. Why: `docs/studies.md`."
    )


def equally_accurate(study: Study, cells: Sequence[CellResult]) -> Iterator[list[str]]:
    """Yield labels of arms with the same cells, to the digit: a switch among them switched
    nothing."""
    alike: dict[str, list[str]] = {}
    for arm, own in by_arm(study, cells).items():
        found = sorted((c.seed, c.order, c.outcome.accuracy_matrix) for c in own)
        alike.setdefault(repr(found), []).append(study.label(arm))
    yield from (labels for labels in alike.values() if len(labels) > 1)


def _measure(cells: Sequence[CellResult], name: str) -> str:
    return _estimated(name, [MEASURES[name](cell.outcome) for cell in cells])


def _estimated(name: str, values: Sequence[float | None]) -> str:
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


def best_baseline(study: Study, accuracy: dict[str, dict[Hashable, float]]) -> str:
    """Return the arm of the highest mean average accuracy, the candidate aside (unless it is
    alone), over the cells that all of them have; over their own where they have none in common."""
    return best_of(baselines_of(study, accuracy))


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


def curves(study: Study, cells: Sequence[CellResult], level: str) -> Iterator[str]:
    """Accuracy of each task after each later one, mean over seeds: a table per order and arm."""
    for order in dict.fromkeys(cell.order for cell in cells):
        for arm, own in by_arm(study, [c for c in cells if c.order == order]).items():
            matrices = [cell.outcome.accuracy_matrix for cell in own]
            tasks, stages = own[0].outcome.tasks, len(matrices[0])
            if stages < 2:
                continue
            yield from (f"{level} {study.label(arm)}" + (f", order {order}" if order else ""), "")
            yield from head("accuracy on", *(f"after {i + 1}" for i in range(stages)))
            for j, task in enumerate(tasks):
                first = min(cell.outcome.begun[j] for cell in own)
                means = (fmean(m[i][j] for m in matrices) for i in range(first, stages))
                yield row(f"{j + 1} {task}", *[""] * first, *(_percent(mean) for mean in means))
            yield ""


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


def _settings(study: Study, cells: Sequence[CellResult]) -> Iterator[str]:
    """Average accuracy of every arm under every setting, and the best setting of each."""
    yield from ("## Average accuracy by setting", "", *setting_table(study, cells), "")
    yield from ("## Best setting of every arm, by average accuracy", "")
    yield from (*best_settings(study, cells), "")


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
