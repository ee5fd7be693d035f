"""Test rows of one task that are training rows of another: what was seen there is no test."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from deal_core.data import Example, TaskData


@dataclass(frozen=True)
class SeenElsewhere:
    """The rows of all tasks so far, as digests.

    Attributes:
        train, test: task to the digests of text and answer, of each row.
    """

    train: dict[str, frozenset[bytes]] = field(default_factory=dict)
    test: dict[str, list[bytes]] = field(default_factory=dict)

    def add(self, task: TaskData) -> None:
        """Take the rows of a task."""
        self.train[task.name] = frozenset(map(_digest, task.train))
        self.test[task.name] = list(map(_digest, task.test))

    def lines(self) -> Iterator[str]:
        """Yield a line for each pair of tasks with such rows."""
        for task, rows in self.test.items():
            for other, known in self.train.items():
                count = sum(row in known for row in rows) if other != task else 0
                if count:
                    yield (
                        f"task '{task}': {count} of {len(rows)} test rows are training rows of "
                        f"task '{other}', answers included; take them out of one side"
                    )


def _digest(example: Example) -> bytes:
    answer = example.label or example.target
    return hashlib.sha256(f"{example.text}\0{answer}".encode("utf-8", "surrogatepass")).digest()
