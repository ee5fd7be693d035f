"""What a person should know of a task's rows: counts and labels, no texts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from deal_core.data import Example, TaskData
from deal_core.data.look_alike import folded

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
    """Yield a line for every kind of oddity: rows of the test file that are in training, rows that
    occur twice, labels that may be one, a single label, texts that say nothing, few test rows."""
    where = f"task '{task.name}'"
    for line in (
        *_in_both(task),
        *_repeated(task),
        *_answered_twice(task),
        *_alike_labels(task),
        *_label_counts(task),
        *_empty_texts(task),
    ):
        yield f"{where}: {line}"


def _answer(example: Example) -> str:
    return example.label or example.target


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


def _repeated(task: TaskData) -> Iterator[str]:
    counts = Counter((example.text, _answer(example)) for example in task.train)
    count = len(task.train) - len(counts)
    if count:
        yield (
            f"{count} of {len(task.train)} training rows repeat an earlier one; remove them, "
            "unless they are different records"
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
        distinct = len({example.text for example in examples})
        if distinct == 1 < len(examples):
            yield f"all {len(examples)} {split} texts are the same; check text_column"
