"""What a task holds, looked at once before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from deal_core.errors import UserError, nearest
from simulations.importing.benchmark import Layout, SourceRow, SourceTask, read_rows

EXAMPLES_PER_LABEL = 2
"""Training examples that an answer has at least, on average, where answers are labels."""


@dataclass(frozen=True)
class Survey:
    """A task and what it holds.

    Attributes:
        task: as found.
        labels: answers among which is chosen, in their order; none: answers are texts.
        instruction: what the prompt asks for; empty: nothing that is the same for all.
        opening: what all texts begin with, and the instruction says instead.
        references: whether an example has several right answers.
    """

    task: SourceTask
    labels: tuple[str, ...]
    instruction: str
    opening: str
    references: bool

    def rows(self, split: str, layout: Layout) -> Iterator[SourceRow]:
        """Yield the examples of a split as they will be written, those without a text or an answer
        too."""
        for row in read_rows(self.task.files[split], layout.fields):
            yield replace(row, text=row.text.removeprefix(self.opening).strip())


def is_whole(row: SourceRow) -> bool:
    """Return whether there is a text and an answer."""
    return bool(row.text and row.answers and row.answers[0])


@dataclass
class _Seen:
    """Attributes: of the rows so far the ``answers`` of each split, a few more than ``most`` at
    most; what all texts ``open`` with; how many training ``examples``; whether one has
    ``several`` answers."""

    most: int
    answers: dict[str, set[str]] = field(default_factory=lambda: {"train": set(), "test": set()})
    open: str | None = None
    examples: int = 0
    several: bool = False

    def add(self, split: str, row: SourceRow) -> None:
        self.examples += split == "train"
        self.several |= len(row.answers) > 1
        self.open = row.text if self.open is None else _common(self.open, row.text)
        if len(self.answers[split]) <= self.most:
            self.answers[split].add(row.answers[0])

    def labels(self) -> tuple[str, ...]:
        """Return the answers where they are labels: few, used again, the same in both splits."""
        train, test = self.answers["train"], self.answers["test"]
        few = len(train) <= self.most and EXAMPLES_PER_LABEL * len(train) <= self.examples
        lines = any("\n" in answer for answer in train)
        return () if self.several or lines or not few or not test <= train else tuple(sorted(train))


def survey(task: SourceTask, layout: Layout, max_labels: int) -> Survey:
    """Return what a task holds, read once.

    Args:
        task: what to read.
        layout: of its benchmark.
        max_labels: without a file of labels, answers are labels where the training examples have at
            most so many, each twice on average, and the test examples no others.

    Raises:
        UserError: a file or an example that cannot be read, an answer that is no label, or a split
            without an example.
    """
    seen = _Seen(max_labels)
    for split, path in task.files.items():
        for number, row in enumerate(read_rows(path, layout.fields), start=1):
            if not is_whole(row):
                continue
            if task.labels and row.answers[0] not in task.labels:
                raise UserError(
                    f"{path}, example {number}: '{row.answers[0]}' is not in labels.json"
                    f"{nearest(row.answers[0], task.labels)}; add it there, or correct the example"
                )
            seen.add(split, row)
    if not seen.answers["train"] or not seen.answers["test"]:
        raise UserError(f"{task.folder}: a split has no example; remove the folder")
    opening = seen.open or ""
    shared = opening[: opening.rfind("\n") + 1] if layout.shared_lines else ""
    labels = task.labels or seen.labels()
    instruction = shared.rstrip() or task.instruction
    return Survey(task, labels, instruction, shared, seen.several and not labels)


def _common(one: str, other: str) -> str:
    """Return what both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))]
