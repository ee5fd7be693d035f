"""What the benchmarks of language models read: real medical questions of one length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from deal_core.config.data import DataConfig
from deal_core.config.experiment import ModelConfig
from deal_core.data import Example
from deal_core.data.embedded import TASKS, MedMCQA
from deal_core.models.prompt import read_template, words

HELD_OUT = 8
"""Test examples, whose loss says that contestants learn alike."""


@dataclass(frozen=True)
class Questions:
    """Attributes: the ``labels`` of a task, and its examples, to ``train`` on and ``held_out``."""

    labels: tuple[str, ...]
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]


@dataclass(frozen=True)
class Prompted:
    """Attributes: token ids of a ``prompt`` and of its ``answer``, the end included."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def questions(count: int, tokens: int, options: int = 0) -> Questions:
    """Return so many training examples and a few others, every text repeated to so many tokens at
    least: the model cuts what is more; with so many labels, those of other tasks too, or (0) those
    of their task."""
    source = MedMCQA(DataConfig())
    task = source.load(next(iter(TASKS)))
    labels = task.labels
    if options:
        known = [label for name in TASKS for label in source.load(name).labels]
        labels = tuple(dict.fromkeys(known))[:options]

    def long(examples: Sequence[Example], count: int) -> Iterator[Example]:
        for number in range(count):
            example = examples[number % len(examples)]
            times = tokens // max(1, len(example.text.split())) + 1
            yield Example(" ".join([example.text] * times), example.label)

    return Questions(labels, tuple(long(task.train, count)), tuple(long(task.test, HELD_OUT)))


def prompted(
    tokenizer: Any,
    model: ModelConfig,
    examples: Sequence[Example],
    labels: Sequence[str],
    tokens: int,
) -> list[Prompted]:
    """Return prompts and answers as a user would write them, with the tokens that the family
    ``causal-lm`` makes of them.

    Args:
        tokenizer: of the model.
        model: its template and instruction.
        examples: texts and their labels.
        labels: of the task.
        tokens: kept of a text.
    """

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    before, after = read_template(model.template).around(model.instruction, labels)
    start, end = (
        [] if mark is None else [mark] for mark in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    )
    return [
        Prompted(
            (*start, *ids(before), *ids(example.text)[:tokens], *ids(after)),
            (*ids(f" {words(example.label)}"), *end),
        )
        for example in examples
    ]
