"""Streams of any size for ``deal bench scale``, cut from the embedded questions.

Texts are real; to have as many tasks and labels as are asked for, they repeat, and a specialty
becomes several labels (``Anatomy 17``). Good for costs, of no use for accuracies.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from deal_core.config.data import DataConfig
from deal_core.data import Example
from deal_core.data.embedded import TASKS, MedMCQA


@dataclass(frozen=True)
class Stream:
    """Attributes: of every task its ``labels``, ``train`` and ``test`` examples and the ``words``
    of a text (0: as it is)."""

    tasks: int = 1
    labels: int = 4
    train: int = 256
    test: int = 16
    words: int = 0


def write_stream(folder: Path, stream: Stream) -> None:
    """Write ``TASK/train.jsonl`` and ``TASK/test.jsonl`` for the data source ``files``."""
    texts = _texts()
    for number in range(stream.tasks):
        examples = cycle(texts)  # every task has the same ones: tasks cost the same
        names = [f"{TASK_LABELS[i % len(TASK_LABELS)]} {number} {i}" for i in range(stream.labels)]
        place = folder / f"task-{number:03}"
        place.mkdir(parents=True)
        for split, count in (("train", stream.train), ("test", stream.test)):
            with (place / f"{split}.jsonl").open("w", encoding="utf-8") as file:
                for position, example in enumerate(islice(examples, count)):
                    row = {
                        "text": _sized(example.text, stream.words),
                        "label": names[position % stream.labels],
                    }
                    file.write(json.dumps(row) + "\n")


TASK_LABELS = tuple(label for labels in TASKS.values() for label in labels)


def _texts() -> list[Example]:
    source = MedMCQA(DataConfig())
    return [example for task in TASKS for example in source.load(task).train]


def _sized(text: str, words: int) -> str:
    return " ".join(islice(cycle(text.split()), words)) if words else text
