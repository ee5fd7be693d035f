"""What the step benchmark trains on: real medical questions, as they are or of one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from deal_core.config.data import DataConfig
from deal_core.config.experiment import ModelConfig
from deal_core.data import Example
from deal_core.data.embedded import TASKS, MedMCQA

MAX_LENGTH = 512
TEST_EXAMPLES = 400


@dataclass(frozen=True)
class Workload:
    """What every contestant of one line gets.

    Attributes:
        tokens: of every text; 0: texts as they are, 43 tokens on average.
        batch_size: examples of an optimiser step.
        examples: in a window.
        windows: different ones; after them the texts repeat.
        options: labels that a prompt lists; 0: those of the task.
    """

    tokens: int
    batch_size: int
    examples: int
    windows: int = 1
    options: int = 0

    @property
    def total(self) -> int:
        """Examples of all windows."""
        return self.examples * self.windows

    @property
    def name(self) -> str:
        """In the table."""
        texts = f"{self.tokens} tokens" if self.tokens else "real texts"
        return f"{texts}, {self.options} options" if self.options else texts


T = TypeVar("T")


class Turn(Generic[T]):
    """Hands out the examples of a workload window by window, and then from the start again."""

    def __init__(self, workload: Workload, examples: Sequence[T]) -> None:
        self._workload, self._examples = workload, examples
        self.number = 0

    def next(self) -> Sequence[T]:
        """The next window's."""
        start = self._workload.examples * (self.number % self._workload.windows)
        self.number += 1
        return self._examples[start : start + self._workload.examples]


@dataclass(frozen=True)
class Texts:
    """Token ids, and the position of each text's label among ``labels``."""

    labels: tuple[str, ...]
    train: tuple[tuple[tuple[int, ...], int], ...]
    test: tuple[tuple[tuple[int, ...], int], ...]


def texts(workload: Workload) -> Texts:
    """Return the training examples of all windows, and a test set."""
    from transformers import AutoTokenizer

    from deal_core.models.loading import pretrained

    tokenizer = pretrained(AutoTokenizer, ModelConfig().name)
    task = MedMCQA(DataConfig()).load(next(iter(TASKS)))
    wanted = workload.total

    def encoded(examples: Sequence[Example], count: int) -> tuple[tuple[tuple[int, ...], int], ...]:
        chosen = [examples[i % len(examples)] for i in range(count)]
        ids = tokenizer([e.text for e in chosen], truncation=True, max_length=MAX_LENGTH)
        return tuple(
            (_cut(tokens, workload.tokens), task.labels.index(example.label))
            for tokens, example in zip(ids["input_ids"], chosen, strict=True)
        )

    return Texts(task.labels, encoded(task.train, wanted), encoded(task.test, TEST_EXAMPLES))


def _cut(tokens: list[int], length: int) -> tuple[int, ...]:
    """The text repeated and cut to ``length`` tokens, its first and last kept."""
    if not length:
        return tuple(tokens)
    middle = tokens[1:-1] * (length // max(1, len(tokens) - 2) + 1)
    return (tokens[0], *middle[: length - 2], tokens[-1])
