"""What a data source is: named tasks, each with labelled training and test texts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from deal_core.config.data import DataConfig
from deal_core.data.sampling import rounded_up, stratified
from deal_core.errors import UserError, choose


@dataclass(frozen=True)
class Example:
    """One text and its answer: a label, or a text."""

    text: str
    label: str
    """Empty: the answer is a text."""
    group: str = ""
    """Value of the partition column (which client owns it); empty: no such column."""
    id: str = ""
    """Whose record it is, as :func:`~deal_core.data.look_alike.same_person` has it; empty: its text
    is all that is known."""
    target: str = ""
    """The answer, where it is a text."""
    references: tuple[str, ...] = ()
    """Further right answers."""
    unit: str = ""
    """Value of ``privacy.unit_column``, likewise: all records with it are one group; empty: no such
    column."""

    @property
    def whose(self) -> str:
        """Whose record it is, as far as that is known: by its group, its id, or its text."""
        return self.unit or self.id or self.text


@dataclass(frozen=True)
class TaskData:
    """One task, whole or one client's part of it."""

    name: str
    labels: tuple[str, ...]
    """The public label space, the same for every client, also where it lacks examples; none: the
    answers are texts."""
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    groups: tuple[str, ...] = ()
    """All values of the partition column over all tasks, sorted, so that one value
    means one client in every task; empty: the values that this task holds."""
    left_out: int = 0
    """Rows that could not be used (site)."""
    held_out: bool = False
    """The test examples are of the training file (``data.split``)."""

    def units(self, grouped: bool) -> int:
        """Return how many training records there are; or, where they are ``grouped``, groups."""
        return len({example.unit for example in self.train}) if grouped else len(self.train)


def declared_labels(config: DataConfig, task: str) -> tuple[str, ...] | None:
    """Return the labels of a task that the experiment names, none where its answers are texts; None
    where only its data tell."""
    if task in config.generation:
        return ()
    return config.labels.get(task) or None


class DataSource(Protocol):
    """Where tasks come from. Deterministic: equal inputs give equal data."""

    def task_names(self) -> tuple[str, ...]:
        """Return the tasks in the order they are learnt; reads no example.

        Raises:
            UserError: unknown or repeated task, or no task at all.
        """
        ...

    def load(self, task: str) -> TaskData:
        """Return all examples of a task, after ``max_train`` and ``max_test``.

        Raises:
            UserError: unknown task, or bad data; one line with place and cure.
        """
        ...


def select_tasks(known: Iterable[str], wanted: tuple[str, ...], kind: str) -> tuple[str, ...]:
    """Return ``wanted`` after a check against ``known``; empty ``wanted``: all known.

    Raises:
        UserError: a wanted task is unknown (the message starts with ``unknown KIND``) or
            named twice.
    """
    names = dict.fromkeys(known)
    for position, task in enumerate(wanted):
        choose(kind, task, names)
        if task in wanted[:position]:
            raise UserError(f"data.tasks names '{task}' twice; name each task once")
    return wanted or tuple(names)


def limited(task: TaskData, config: DataConfig) -> TaskData:
    """Return the task cut to ``max_train`` and ``max_test`` examples (0: no limit), and its
    training examples to ``train_share`` of what is left.

    The subset has each label in its share of the whole and is the same on every
    machine and for every seed.
    """
    train = stratified(task.train, config.max_train)
    return replace(
        task,
        train=stratified(train, rounded_up(config.train_share, len(train))),
        test=stratified(task.test, config.max_test),
    )
