"""All that is wrong, or odd, with the rows of all tasks; read once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from deal_core.config.experiment import Experiment
from deal_core.data import TaskData, open_source
from deal_core.data.files import FilesSource
from deal_core.errors import UserError
from simulations.check.finding import Finding
from simulations.check.number_labels import number_labels
from simulations.check.odd_rows import odd_rows
from simulations.check.seen_elsewhere import SeenElsewhere

ROW = re.compile(r", row (\d+): ")
NAMED = 5
"""Further rows with the same problem that a line names."""


def check_rows(experiment: Experiment) -> Iterator[Finding]:
    """Yield how many rows every task has, their problems, and what is odd about those that can be
    read.

    Raises:
        UserError: the source itself cannot be opened.
    """
    source = open_source(experiment.data, experiment.privacy.unit_column)
    elsewhere = SeenElsewhere()
    for name in source.task_names():
        problems: list[UserError] = []
        try:
            if isinstance(source, FilesSource):
                task, problems = source.examine(name)
            else:
                task = source.load(name)
        except UserError as error:
            problems, task = [error], TaskData(name, (), (), ())
        if task.train:
            yield Finding(described(task), kind="note")
        yield from (Finding(text) for text in grouped(map(str, problems)))
        odd = (*odd_rows(task), *number_labels(task, experiment))
        yield from (Finding(text, kind="warning") for text in odd)
        elsewhere.add(task)
    yield from (Finding(text, kind="warning") for text in elsewhere.lines())


def described(task: TaskData) -> str:
    """Return how much there is of a task."""
    answers = f"{len(task.labels)} labels" if task.labels else "answers are texts"
    return f"task '{task.name}': {len(task.train)} train and {len(task.test)} test rows, {answers}"


def grouped(problems: Iterable[str]) -> list[str]:
    """Return each problem once, with the first row that has it, and how many more have."""
    rows: dict[str, list[str]] = {}
    first: dict[str, str] = {}
    for problem in problems:
        place = ROW.search(problem)
        key = ROW.sub(": ", problem, count=1) if place else problem
        first.setdefault(key, problem)
        rows.setdefault(key, []).extend([place[1]] if place else [])
    return [text + _more(rows[key][1:]) for key, text in first.items()]


def _more(rows: list[str]) -> str:
    if not rows:
        return ""
    named = ", ".join(rows[:NAMED]) + (", ..." if len(rows) > NAMED else "")
    return f" (and {len(rows)} more {'row' if len(rows) == 1 else 'rows'}: {named})"
