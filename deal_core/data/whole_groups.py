"""Groups of records that stay together when a task is divided among clients."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from deal_core.data.source import Example, TaskData

Owners = list[list[int]]
"""Indices of each client; disjoint."""
Rows = dict[str, list[int]]
"""Group to the indices of its examples."""


@dataclass(frozen=True)
class OneEach:
    """A task with one example for each of its groups.

    Attributes:
        task: an example for each group of the training examples, and for each group that the test
            examples have alone.
        train, test: group to its examples, in the whole task.
    """

    task: TaskData
    train: Rows
    test: Rows

    @property
    def train_units(self) -> list[str]:
        """Groups of the training examples, in the order of the task's."""
        return list(self.train)

    def train_rows(self, owners: Owners) -> Owners:
        """Return the clients' training examples, from the groups that they have."""
        units = self.train_units
        return [sorted(i for n in own for i in self.train[units[n]]) for own in owners]

    def test_rows(self, owners: Owners, alone: Owners) -> Owners:
        """Return the clients' test examples.

        Args:
            owners: of the groups of training examples: their test examples go along.
            alone: of the groups that only the test examples have.
        """
        units, others = self.train_units, [unit for unit in self.test if unit not in self.train]
        found = []
        for own, own_alone in zip(owners, alone, strict=True):
            names = [*(units[n] for n in own), *(others[n] for n in own_alone)]
            found.append(sorted(i for name in names for i in self.test.get(name, ())))
        return found


def one_each(task: TaskData) -> OneEach:
    """Return the task with the commonest of each group's labels on one example."""
    train, test = rows_by_unit(task.train), rows_by_unit(task.test)
    return OneEach(
        replace(
            task,
            train=tuple(_commonest(task.train, rows) for rows in train.values()),
            test=tuple(_commonest(task.test, test[unit]) for unit in test if unit not in train),
        ),
        train,
        test,
    )


def rows_by_unit(examples: Sequence[Example]) -> Rows:
    """Return the indices of every group's examples, groups in the order in which they occur."""
    found: Rows = {}
    for index, example in enumerate(examples):
        found.setdefault(example.unit, []).append(index)
    return found


def by_name(units: Sequence[str], clients: int, seed: int) -> Owners:
    """Return groups by client, evenly at random: by a hash of the group's name and the seed alone,
    so that one has the same client in every task."""
    owners: Owners = [[] for _ in range(clients)]
    for index, unit in enumerate(units):
        digest = hashlib.sha256(f"{seed}/group/{unit}".encode()).digest()
        owners[int.from_bytes(digest[:8], "big") % clients].append(index)
    return owners


def _commonest(examples: Sequence[Example], rows: Sequence[int]) -> Example:
    """Return the first example with the commonest label; of equally common ones, the first."""
    labels = Counter(examples[i].label for i in rows)
    label = max(labels, key=lambda name: labels[name])
    return next(examples[i] for i in rows if examples[i].label == label)
