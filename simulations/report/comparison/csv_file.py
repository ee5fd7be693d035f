"""A comparison as CSV: a row for each run, exact values, names that a program can use."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable

from simulations.report.comparison.compared import ComparedRun, Comparison

Value = str | float | int | bool | None

COLUMNS: dict[str, Callable[[ComparedRun], Value]] = {
    "run": lambda run: run.name,
    "method": lambda run: run.results.config.method.name,
    "seed": lambda run: run.results.seed,
    "average_accuracy": lambda run: run.results.average_accuracy,
    "all_labels_average_accuracy": lambda run: run.among_all,
    "zero_shot_accuracy": lambda run: run.results.mean_zero_shot,
    "backward_transfer": lambda run: run.results.backward_transfer,
    "forward_transfer": lambda run: run.results.forward_transfer,
    "forgetting": lambda run: run.results.forgetting,
    "worst_client": lambda run: run.worst_client,
    "epsilon": lambda run: run.epsilon,
    "delta": lambda run: run.results.privacy.delta,
    "unit": lambda run: run.results.privacy.unit_text or None,
    "composed_over": lambda run: "" if run.epsilon is None else run.results.privacy.extent,
    "assumes": lambda run: run.results.privacy.trust,
    "void": lambda run: run.results.privacy.void,
    "simulation_only": lambda run: run.results.privacy.simulation_only,
    "seconds": lambda run: run.seconds,
    "bytes_up_per_client": lambda run: sum(run.results.wire.bytes_up),
    "bytes_down_per_client": lambda run: run.results.wire.received,
    "peak_rss_bytes": lambda run: run.results.peak_rss_bytes,
    "commit": lambda run: run.results.commit,
    "finished": lambda run: run.results.finished,
}
"""Column to its value; an empty cell is a value that is not known."""


def csv_text(comparison: Comparison) -> str:
    """Return the file; behind the measures, the settings in which the runs differ."""
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow([*COLUMNS, *comparison.keys])
    for run in comparison.runs:
        values = [value(run) for value in COLUMNS.values()]
        writer.writerow(["" if v is None else _plain(v) for v in [*values, *run.settings.values()]])
    return written.getvalue()


def _plain(value: object) -> str:
    """Return a cell: floats to their last digit, lists and tables as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
