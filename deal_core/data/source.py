"""What a data source is: named tasks, each with labelled training and test texts; and which of its
examples a task keeps.

A subset has each label in its share. Test examples taken out of a training file, where there is no
file of them, are those that their own content says: on no seed, on every machine, in every run, and
in any order of the rows. Rows alike in text and answer are on one side; where they have a unit,
those of one unit.
"""

import hashlib
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from deal_core.config.data import DataConfig
from deal_core.data.tags import OUTSIDE
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
    """Whose record it is, as :func:`~deal_core.data.rows.same_person` has it; empty: its text
    is all that is known."""
    target: str = ""
    """The answer, where it is a text."""
    references: tuple[str, ...] = ()
    """Further right answers."""
    unit: str = ""
    """Value of ``privacy.unit_column``, likewise: all records with it are one group; empty: no such
    column."""
    tags: tuple[str, ...] = ()
    """The answer, where each word has one (:mod:`deal_core.data.tags`)."""

    @property
    def whose(self) -> str:
        """Whose record it is, as far as that is known: by its group, its id, or its text."""
        return self.unit or self.id or self.text

    @property
    def labels(self) -> set[str]:
        """The labels that the answer names: one, or those of its tags."""
        return {tag[2:] for tag in self.tags if tag != OUTSIDE} if self.tags else {self.label}


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
    """Rows without text or answer; at a site all that could not be used."""
    held_out: bool = False
    """The test examples are of the training file (``data.split``)."""

    def units(self, grouped: bool) -> int:
        """Return how many training records there are; or, where they are ``grouped``, groups."""
        return len({example.unit for example in self.train}) if grouped else len(self.train)


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


def declared_labels(config: DataConfig, task: str) -> tuple[str, ...] | None:
    """Return the labels of a task that the experiment names, none where its answers are texts; None
    where only its data tell."""
    return () if task in config.generation else config.labels.get(task) or None


def named_tasks(config: DataConfig) -> tuple[str, ...]:
    """Return the tasks that an experiment names: those with labels, then those whose answers are
    texts."""
    return tuple(dict.fromkeys([*config.labels, *config.generation]))


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
    """Return the task cut to ``max_train`` and ``max_test`` examples (0: no limit)."""
    train, test = stratified(task.train, config.max_train), stratified(task.test, config.max_test)
    return replace(task, train=train, test=test)


def by_label(examples: Sequence[Example]) -> dict[str, list[int]]:
    """Return the indices of each label's examples; labels sorted, indices ascending."""
    found: defaultdict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        found[example.label].append(index)
    return {label: found[label] for label in sorted(found)}


def largest_remainder(weights: Sequence[int], total: int, ties: random.Random) -> list[int]:
    """Return integers in proportion to ``weights`` that sum to ``total``.

    Equal remainders are served in an order drawn from ``ties``. Weights of zero get
    nothing, unless all are zero: then all count the same.
    """
    if not any(weights):
        weights = [1] * len(weights)
    whole = sum(weights)
    shares = [weight * total // whole for weight in weights]
    order = list(range(len(weights)))
    ties.shuffle(order)
    # Integer remainders: no float rounding decides who is served.
    order.sort(key=lambda index: weights[index] * total % whole, reverse=True)
    for index in order[: total - sum(shares)]:
        shares[index] += 1
    return shares


def stratified(examples: tuple[Example, ...], limit: int) -> tuple[Example, ...]:
    """Return at most ``limit`` examples, each label in its share, in their old order.

    The draw depends on the examples alone, on no seed. 0: no limit. From ``limit`` =
    number of labels on, every label keeps at least one example; below, some labels go.
    """
    if not 0 < limit < len(examples):
        return examples
    rng = random.Random("stratified")
    indices = by_label(examples)
    sizes = [len(group) for group in indices.values()]
    floor = 1 if limit >= len(sizes) else 0
    extra = largest_remainder([size - floor for size in sizes], limit - floor * len(sizes), rng)
    kept: set[int] = set()
    for group, more in zip(indices.values(), extra, strict=True):
        kept.update(rng.sample(group, floor + more))
    return tuple(examples[index] for index in sorted(kept))


def each_by_itself(examples: Sequence[Example], task: str, share: float) -> tuple[Example, ...]:
    """Return about a ``share`` of the examples: those whose own hash, under the task's name, is
    small; of examples with a unit the unit alone decides, the same in every task."""

    def place(example: Example) -> float:
        if example.unit:
            return _hashed("unit", example.unit)
        answer = (example.target,) if example.target else ()
        return _hashed(task, example.id, example.label, example.text, *answer)

    return tuple(example for example in examples if place(example) < share)


Sides = tuple[tuple[Example, ...], tuple[Example, ...]]
"""Training and test examples, in their old order."""


def split_off(examples: Sequence[Example], share: float) -> Sides:
    """Return training and test examples: of every label, a ``share`` is for testing, and at least
    one of two. A text with several labels is placed for each of them, and may be on both sides.
    Where examples have a unit, all of a unit are on one side, and the share of a label is about
    right."""
    if any(example.unit for example in examples):
        return split_off_each(examples, share)
    places = [_side(example) for example in examples]
    test: set[int] = set()
    for indices in by_label(examples).values():
        order = sorted(indices, key=places.__getitem__)
        count = min(max(1, round(share * len(order))), len(order) - 1)
        while 0 < count < len(order) and places[order[count]] == places[order[count - 1]]:
            count += 1
        test.update(order[: count if count < len(order) else 0])
    return _sides(examples, test.__contains__)


def split_off_each(examples: Sequence[Example], share: float) -> Sides:
    """Return training and test examples, each where its own content, or its unit, says: about a
    ``share`` is for testing. Where records are protected no record may move another one."""
    return _sides(examples, lambda index: _side(examples[index]) < share)


def _sides(examples: Sequence[Example], is_test: Callable[[int], bool]) -> Sides:
    sides: tuple[list[Example], list[Example]] = [], []
    for index, example in enumerate(examples):
        sides[is_test(index)].append(example)
    return tuple(sides[0]), tuple(sides[1])


def _side(example: Example) -> float:
    named = ("unit", example.unit) if example.unit else (example.text, example.target)
    return _hashed("split", *named)


def _hashed(*parts: str) -> float:
    """Return a number in [0, 1) that depends on the parts alone."""
    digest = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
