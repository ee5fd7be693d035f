"""The measures of several runs, and the settings in which they differ."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deal_core.config.run_config import leaves
from deal_core.errors import UserError, at_home
from server.results import Results, read_results
from simulations.report.run.settings import HIDDEN
from simulations.run.run_folder import rows_of


@dataclass(frozen=True)
class ComparedRun:
    """One run; accuracies are 0 to 1, None: not known.

    Attributes:
        name: of its folder, made its own among those compared.
        results: of the run.
        settings: those in which the runs differ, by flat key.
    """

    name: str
    results: Results
    settings: Mapping[str, Any]

    @property
    def among_all(self) -> float | None:
        """Average accuracy among all labels seen so far."""
        found = self.results.class_incremental
        return None if found is None else found.average_accuracy

    @property
    def worst_client(self) -> float | None:
        """Smallest of the clients' own average accuracies."""
        worst = self.results.worst_client
        return worst[1] if worst else None

    @property
    def epsilon(self) -> float | None:
        """Largest over clients; None: there is no guarantee."""
        privacy = self.results.privacy
        if privacy.delta is None or privacy.unit is None:
            return None
        return max(privacy.epsilon.values(), default=None)

    @property
    def guarantee(self) -> str:
        """What the epsilon means; empty where there is none."""
        privacy = self.results.privacy
        if self.epsilon is None:
            return ""
        return f"epsilon {privacy.meaning}"

    @property
    def seconds(self) -> float | None:
        """Of the whole run."""
        return self.results.seconds.get("total")


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        warnings: why figures may not be comparable.
    """

    runs: tuple[ComparedRun, ...]
    warnings: tuple[str, ...]

    @property
    def keys(self) -> list[str]:
        """Settings in which the runs differ."""
        return list(self.runs[0].settings)


def compare(folders: Sequence[str]) -> Comparison:
    """Return the comparison of the runs in the folders.

    Raises:
        UserError: fewer than two runs, one twice, or one that has not finished.
    """
    paths = [at_home(folder).resolve() for folder in folders]
    if len(paths) < 2:
        raise UserError("deal compare: name two runs at least")
    if len(set(paths)) < len(paths):
        raise UserError("deal compare: names a run twice; name each once")
    results = [read_results(path) for path in paths]
    settings = [_settings(each) for each in results]
    names = _names(paths)
    differing = [key for key in settings[0] if len({json.dumps(s[key]) for s in settings}) > 1]
    runs = tuple(
        ComparedRun(name, found, {key: own[key] for key in differing})
        for name, found, own in zip(names, results, settings, strict=True)
    )
    warnings = [*_warnings(runs), *_other_rows([rows_of([path]) for path in paths], runs)]
    return Comparison(runs, tuple(warnings))


def _settings(results: Results) -> dict[str, Any]:
    return {key: value for key, value in leaves(results.config).items() if key not in HIDDEN}


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the names of the folders, with as many of their parents as make them different."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _warnings(runs: Sequence[ComparedRun]) -> list[str]:
    found = []
    if len({tuple(sorted(run.results.tasks)) for run in runs}) > 1:
        found.append("The runs have different tasks: their accuracies are of different questions.")
    elif len({tuple(run.results.tasks) for run in runs}) > 1:
        found.append("The runs have the same tasks in different orders.")
    if len({run.results.config.model.name for run in runs}) > 1:
        found.append("The runs have different base models.")
    return found


def _other_rows(rows: Sequence[Mapping[str, str]], runs: Sequence[ComparedRun]) -> Iterator[str]:
    """Yield a line on tasks whose rows differ, by what the runs have noted of them, or else by the
    numbers of test rows that clients told."""
    for task in runs[0].results.tasks:
        noted = {each[task] for each in rows if task in each}
        if len(noted) > 1:
            yield f"Task '{task}' has other rows in one run than in another."
        elif sum(task in each for each in rows) < len(rows):
            counted = {_tests(run.results, task) for run in runs} - {0}
            if len(counted) > 1:
                yield f"Task '{task}' was tested on other numbers of rows."


def _tests(results: Results, task: str) -> int:
    """Of all clients; 0: not known."""
    if task not in results.tasks:
        return 0
    place = results.tasks.index(task)
    return sum(each.test_examples[place] for each in results.per_client.values())


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
