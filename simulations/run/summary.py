"""The end of a run on one screen: accuracies of its tasks, the measures, where the files lie."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from rich.console import Console

from deal_core import metrics
from deal_core.config.experiment import Experiment
from deal_core.training.text_overlap import TITLES
from server.folder import RunFolder, read_events
from server.results import Measures, Privacy, Results, read_results, rounded_up
from simulations.output import Table, at_work, duration, print_line, print_table, signed, size
from simulations.run.run_log import RunLog

ACCURACY = "accuracy"
LARGE_DELTA = 0.1
"""Times the number of units; above it a run's report warns."""


def print_report(console: Console, folder: Path) -> None:
    """Read ``results.json`` of a run folder and print it, in the columns of a window as it opens.

    Raises:
        UserError: there is none, or it is not valid.
    """
    with at_work(console, "reading the results"):
        from simulations.run.data_checks import membership_text  # a demo has no PyTorch yet

    results = read_results(folder)
    if results.accuracy_matrix:
        print_table(console, task_table(results))
    run = RunFolder(folder)
    records = RunLog(read_events(run.metrics)).label_records
    told = membership_text(results.config, records, len(results.tasks))
    rows = [*measures(results), *[("class sums", told)] * bool(told), ("results", str(run.results))]
    for name, value in rows:
        print_line(console, f"{name:<20}{value}")


def measured_by(experiment: Experiment, tasks: Sequence[str]) -> list[str]:
    """Return of each task what its figures are: ``accuracy``, or the title of another measure."""
    return [TITLES[experiment.data.measure(task)] for task in tasks]


def one_name(names: Sequence[str]) -> str:
    """Return what figures of several tasks are together: their one measure, or ``score``."""
    return names[0] if len(set(names)) == 1 else "score"


def task_table(results: Results) -> Table:
    """Return a row for each task, in per cent; the report has the whole matrix."""
    among_all, measured = results.class_incremental, measured_by(results.config, results.tasks)
    mixed = len(set(measured)) > 1
    _, learnt = metrics.spans(results.tasks, [list(stage.work) for stage in results.stages])
    columns = ["task", *["measure"] * mixed, "zero-shot", "just learnt", "at the end", "since"]
    columns += [] if among_all is None else ["Class-IL"]
    rows = []
    for j, task in enumerate(results.tasks):
        then, now = (metrics.measured(results.accuracy_matrix, i, j) for i in (learnt[j], -1))
        cells = [measured[j]] * mixed
        cells += [f"{100 * share:.1f}" for share in (results.zero_shot[task], then, now)]
        cells += [signed(now - then)]
        if among_all is not None:
            cells.append(f"{100 * metrics.measured(among_all.accuracy_matrix, -1, j):.1f}")
        rows.append((f"{j + 1} {task}", *cells))
    name = one_name(measured)
    title = f"{name[0].upper()}{name[1:]} in %, and points since the task was learnt"
    return Table(title, tuple(columns), tuple(rows))


def measures(results: Results) -> list[tuple[str, str]]:
    """Return name and text of every measure."""
    by_client = "by a client that is asked in every round"
    rows = [
        *_accuracy(results),
        ("sent per client", f"{size(sum(results.wire.bytes_up))} {by_client}"),
        ("received per client", f"{size(results.wire.received)} {by_client}"),
        ("time", duration(results.seconds.get("total", 0.0))),
        ("privacy", privacy_text(results.privacy)),
        ("warning", large_delta(results.privacy)),
        *_in_two_lines(results),
    ]
    return [row for row in rows if row[1]]


def _in_two_lines(results: Results) -> list[tuple[str, str]]:
    """Return what was learnt and what was forgotten, for who reads nothing else."""
    if results.forgetting is None or len(results.tasks) < 2:
        return []
    _, learnt = metrics.spans(results.tasks, [list(stage.work) for stage in results.stages])
    then = 100 * metrics.learning_accuracy(results.accuracy_matrix, learnt)
    before, lost = 100 * fmean(results.zero_shot.values()), 100 * results.forgetting
    several = len(set(measured_by(results.config, results.tasks))) > 1
    mean = " (means over tasks of several measures)" * several
    return [
        ("learnt", f"{then:.1f} % when a task was just learnt, {before:.1f} % before{mean}"),
        ("forgotten", f"{lost:.1f} points of the best that a task had, by the end of the run"),
    ]


def _accuracy(results: Results) -> list[tuple[str, str]]:
    if results.average_accuracy is None:
        unknown = "clients keep their counts of right answers, or a sum of them was lost"
        return [("accuracy", f"not known: {unknown}")]
    measured = measured_by(results.config, results.tasks)
    start = [results.zero_shot[task] for task in results.tasks]
    class_il = results.class_incremental
    return [
        *_means("average {}", measured, metrics.last_row(results.accuracy_matrix)),
        *(
            _means("Class-IL {}", measured, metrics.last_row(class_il.accuracy_matrix))
            if class_il
            else ()
        ),
        *_means("zero-shot {}", measured, start),
        *_transfer("", results),
        *(_transfer("Class-IL ", class_il) if class_il else ()),
        ("counts", unheard_text(results)),
    ]


def _means(name: str, measured: Sequence[str], row: Sequence[float]) -> list[tuple[str, str]]:
    """Return the mean of a row of the accuracy matrix by each measure; the tasks, where there are
    several measures."""
    found = []
    for each in dict.fromkeys(measured):
        own = [j for j, measure in enumerate(measured) if measure == each]
        tasks = f" ({'task' if len(own) == 1 else 'tasks'} {', '.join(str(j + 1) for j in own)})"
        text = f"{100 * fmean(row[j] for j in own):.1f} %"
        found.append((name.format(each), text + tasks * (len(set(measured)) > 1)))
    return found


def _transfer(protocol: str, found: Measures) -> list[tuple[str, str]]:
    backward, forward, forgotten = found.backward_transfer, found.forward_transfer, found.forgetting
    if backward is None or forward is None or forgotten is None:
        unknown = "not known: no client was heard in all evaluations"
        return [] if protocol else [("transfer", unknown)]
    text = f"{100 * forgotten:.1f} points"
    if protocol:
        return [(f"{protocol}transfer", f"backward {signed(backward)}, forgetting {text}")]
    return [
        ("backward transfer", f"{signed(backward)} points"),
        ("forward transfer", f"{signed(forward)} points"),
    ]


def unheard_text(results: Results) -> str:
    """Return whose counts are missing where, and what follows; empty: nobody's."""
    if not any(results.unheard):
        return ""
    missing = ", ".join(
        f"{number} after stage {place}" if place else f"{number} before training"
        for place, number in enumerate(results.unheard)
        if number
    )
    return (
        f"some are missing ({missing}): accuracies are of the clients heard then, transfer and "
        "forgetting of those heard always"
    )


def privacy_text(privacy: Privacy) -> str:
    """Say what is guaranteed. An epsilon without delta and unit means nothing: not shown."""
    if privacy.mechanism == "none":
        return "none (no text leaves its client, but updates carry no formal guarantee)"
    if not privacy.epsilon or privacy.delta is None or privacy.unit is None:
        return f"{privacy.mechanism}; no guarantee recorded"
    largest = max(privacy.epsilon.values())
    return f"{privacy.mechanism}: epsilon <= {rounded_up(largest, 3)} {privacy.meaning}"


def large_delta(privacy: Privacy) -> str:
    """Return a warning where a site's policy has allowed a delta that is large for its number of
    units; empty: it is small, or the number not known."""
    if privacy.n_delta is None or privacy.n_delta <= LARGE_DELTA:
        return ""
    return (
        f"delta = {rounded_up(privacy.delta or 0.0, 3)} is large: {rounded_up(privacy.n_delta, 2)} "
        f"{privacy.unit}s of a client may be told outright; set privacy.target_delta"
    )
