"""What is odd in the rows of an experiment's tasks, and all quick checks together."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from deal_core.config.experiment import Experiment
from deal_core.data import TaskData, open_source
from deal_core.data.files import FilesSource
from deal_core.data.rows import folded
from deal_core.errors import UserError
from simulations.run.findings import (
    Check,
    Finding,
    check_privacy,
    check_training,
    reading,
)

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


FEW_CHARACTERS = 3
"""A text with fewer says nothing."""
MANY = 0.1
"""Share of texts that say nothing, from which they are worth a line."""
FEW_TESTS = 20
"""Test rows, below which one answer is five points of accuracy or more."""
MANY_LABELS = 20
ROWS_PER_LABEL = 2
"""Fewer training rows than this for each of many labels: that column holds texts."""


def odd_rows(task: TaskData) -> Iterator[str]:
    """Yield a line for every kind of oddity: rows of the test file that are in training, texts of
    several labels, labels that may be one, a single label, texts that say nothing, few tests."""
    where = f"task '{task.name}'"
    for line in (
        *_in_both(task),
        *_answered_twice(task),
        *_alike_labels(task),
        *_label_counts(task),
        *_empty_texts(task),
    ):
        yield f"{where}: {line}"


def _in_both(task: TaskData) -> Iterator[str]:
    known = {example.text for example in task.train}
    count = sum(example.text in known for example in task.test)
    # data.split keeps those of one text and one answer, or of one group, on one side.
    cure = "add a test file without them" if task.held_out else "take them out of one side"
    if count:
        yield (
            f"{count} of {len(task.test)} test rows have a text that is in training too; {cure}: "
            "accuracy is partly of what was seen"
        )


def _answered_twice(task: TaskData) -> Iterator[str]:
    answers: defaultdict[str, set[str]] = defaultdict(set)
    for example in task.train:
        answers[example.text].add(example.label)
    count = sum(len(labels) > 1 for labels in answers.values())
    if count:
        yield f"{count} training texts have several labels; a model can learn one at most"


def _alike_labels(task: TaskData) -> Iterator[str]:
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for label in task.labels:
        alike[folded(label)].append(label)
    for labels in alike.values():
        if len(labels) > 1:
            named = ", ".join(map(ascii, labels))
            yield f"labels {named} look alike, and are different ones; write them alike"


def _label_counts(task: TaskData) -> Iterator[str]:
    counts = Counter(example.label for example in task.train)
    if len(task.labels) == 1 and task.train:
        yield f"one label ('{task.labels[0]}'): there is nothing to tell apart; check label_column"
    if len(task.labels) > MANY_LABELS and len(task.train) < ROWS_PER_LABEL * len(task.labels):
        yield (
            f"{len(task.labels)} labels in {len(task.train)} training rows: is label_column one of "
            "texts? data.generation is for answers that are texts"
        )
    elif task.train and task.labels:
        few = sorted(label for label in task.labels if counts[label] < ROWS_PER_LABEL)
        if few:
            yield f"fewer than {ROWS_PER_LABEL} training rows of: {', '.join(few[:5])}"
    if task.train and 0 < len(task.test) < FEW_TESTS:
        yield f"{len(task.test)} test rows: one answer is {100 / len(task.test):.0f} % of accuracy"


def _empty_texts(task: TaskData) -> Iterator[str]:
    for split, examples in (("training", task.train), ("test", task.test)):
        count = sum(len(example.text) < FEW_CHARACTERS for example in examples)
        if count > MANY * len(examples):
            yield (
                f"{count} of {len(examples)} {split} texts have fewer than {FEW_CHARACTERS} "
                "characters: the column is nearly empty; check text_column"
            )


OWN_DATA = ("files", "hub")
"""Sources whose labels are somebody's own, and have a table ``label_text``."""
READS_NO_NAMES = ("prototype", "linear-probe")
"""Methods that answer by heads alone."""
NUMBER = re.compile(r"[-+]?\d+([.,]\d+)?")
SHOWN = 3


def number_labels(task: TaskData, experiment: Experiment) -> Iterator[str]:
    """Yield a line where all labels of a task are numbers, such as ids of classes: encoders compare
    texts with the names of labels, and models that answer in words say them."""
    source, method = experiment.data.source, experiment.method.name
    if source not in OWN_DATA or method in READS_NO_NAMES or not task.labels:
        return
    if all(NUMBER.fullmatch(label) for label in task.labels):
        shown = ", ".join(f"'{label}'" for label in task.labels[:SHOWN])
        more = ", ..." if len(task.labels) > SHOWN else ""
        yield (
            f"task '{task.name}': its labels are numbers ({shown}{more}), and the model reads "
            f"labels as words; set data.{source}.{task.name}.label_text to their names"
        )


ROWS = "rows"
"""The fact that all rows can be read."""
QUICK = (
    Check(check_rows, reading("data"), settles=ROWS),
    Check(check_training, reading("train", "federation", "adapter", "privacy", "method")),
    Check(check_privacy, reading("privacy")),
)
