"""The end of a run on one screen: accuracies of its tasks, the measures, where the files lie."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from deal_core.metrics import average_accuracy, learning_accuracy, spans
from deal_core.training.text_overlap import TEXT_MEASURES
from server.folder import RunFolder
from server.results import Privacy, Results, read_results, rounded_up
from simulations.output.console import print_line, print_table
from simulations.output.files import Table, duration, signed

LARGE_DELTA = 0.1
"""Times the number of units; above it a run's report warns."""


def print_report(console: Console, folder: Path) -> None:
    """Read ``results.json`` of a run folder and print it, in the columns of a window as it opens.

    Raises:
        UserError: there is none, or it is not valid.
    """
    results = read_results(folder)
    if results.accuracy_matrix:
        print_table(console, task_table(results))
    lines = [*measures(results), ("results", str(RunFolder(folder).results)), *outcome(results)]
    for name, value in lines:
        print_line(console, f"{name:<20}{value}")


def task_table(results: Results) -> Table:
    """Return a row for each task, in per cent; the report has the whole matrix."""
    all_labels = results.class_incremental
    stages = [list(stage.work) for stage in results.stages]
    _, learnt = spans(results.tasks, stages)
    columns = ["task", "zero-shot", "just learnt", "at the end", "since"]
    columns += [] if all_labels is None else ["Class-IL"]
    rows = []
    for j, task in enumerate(results.tasks):
        then, now = results.accuracy_matrix[learnt[j]][j], results.accuracy_matrix[-1][j]
        cells = [f"{100 * share:.1f}" for share in (results.zero_shot[task], then, now)]
        cells += [signed(now - then)]
        if all_labels is not None:
            cells.append(f"{100 * all_labels.accuracy_matrix[-1][j]:.1f}")
        rows.append((f"{j + 1} {task}", *cells))
    return Table("Accuracy in %, and points since the task was learnt", tuple(columns), tuple(rows))


def measures(results: Results) -> list[tuple[str, str]]:
    """Return name and text of every measure."""
    by_client = "by a client that is asked in every round"
    texts = {
        own.title: ", ".join(
            f"task {number} {task}"
            for number, task in enumerate(results.tasks, start=1)
            if results.measures.get(task) == name
        )
        for name, own in TEXT_MEASURES.items()
    }
    rows = [
        *_accuracy(results),
        *texts.items(),
        ("sent per client", f"{_size(sum(results.wire.bytes_up))} {by_client}"),
        ("received per client", f"{_size(results.wire.received)} {by_client}"),
        ("time", duration(results.seconds.get("total", 0.0))),
        ("privacy", privacy_text(results.privacy)),
        ("warning", large_delta(results.privacy)),
    ]
    return [row for row in rows if row[1]]


def outcome(results: Results) -> list[tuple[str, str]]:
    """Return what was learnt and what was forgotten, for who reads nothing else; nothing where
    counts are missing."""
    if results.backward_transfer is None or results.mean_zero_shot is None:
        return []
    if len(results.tasks) < 2:
        return []
    matrix, before = results.accuracy_matrix, 100 * results.mean_zero_shot
    _, learnt = spans(results.tasks, [list(stage.work) for stage in results.stages])
    then, now = 100 * learning_accuracy(matrix, learnt), 100 * average_accuracy(matrix)
    return [
        ("learnt", f"{then:.1f} % right when a task was just learnt; {before:.1f} % before"),
        ("forgotten", f"{max(0.0, then - now):.1f} of these points by the end of the run"),
    ]


def _accuracy(results: Results) -> list[tuple[str, str]]:
    average, zero_shot = results.average_accuracy, results.mean_zero_shot or 0.0
    if average is None:
        unknown = "clients keep their counts of right answers, or a sum of them was lost"
        return [("accuracy", f"not known: {unknown}")]
    return [
        ("average accuracy", f"{100 * average:.1f} %"),
        ("Class-IL accuracy", _class_il(results)),
        ("zero-shot accuracy", f"{100 * zero_shot:.1f} %"),
        *_transfer(results),
        ("counts", unheard_text(results)),
    ]


def _transfer(results: Results) -> list[tuple[str, str]]:
    backward, forward = results.backward_transfer, results.forward_transfer
    if backward is None or forward is None or results.forgetting is None:
        return [("transfer", "not known: no client was heard in all evaluations")]
    return [
        ("backward transfer", f"{signed(backward)} points"),
        ("forward transfer", f"{signed(forward)} points"),
        ("forgetting", f"{100 * results.forgetting:.1f} points"),
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


def _class_il(results: Results) -> str:
    found = results.class_incremental
    if found is None:
        return ""
    text = f"{100 * found.average_accuracy:.1f} %"
    if found.backward_transfer is None or found.forgetting is None:
        return text
    return (
        f"{text}, backward transfer {signed(found.backward_transfer)}, "
        f"forgetting {100 * found.forgetting:.1f} points"
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


def _size(count: float) -> str:
    if count < 1e6:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e6:.1f} MB"
