"""The embedded default: route a medical exam question to its specialty.

7,140 MedMCQA questions in 18 specialties, grouped into five tasks. Each task mixes
frequent and rare specialties; a specialty is capped at 600 questions, because Dental
alone (2,500) would swamp its task. Left out: questions of unknown specialty, the
specialties below 60 questions (Psychiatry, Orthopaedics), and repeats. One in five
questions of each specialty is for testing; the split is the same on every machine.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from deal_core.config.data import DataConfig
from deal_core.data.assets import asset_folder, cure
from deal_core.data.source import Example, TaskData, limited, select_tasks
from deal_core.errors import UserError, choose

TASKS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "basic-science": ("Anatomy", "Biochemistry", "Physiology"),
        "laboratory": ("Forensic Medicine", "Microbiology", "Pathology", "Pharmacology"),
        "medicine": ("Medicine", "Pediatrics", "Skin", "Social Preventive Medicine"),
        "surgery": ("Anaesthesia", "Gynaecology Obstetrics", "Radiology", "Surgery"),
        "head-and-neck": ("Dental", "ENT", "Ophthalmology"),
    }
)
"""Task to its labels, in the order the tasks are learnt."""

CAP = 600
TEST_SHARE = 5
"""One question in this many is for testing."""
FOLDERS = ("MedMCQA-Test", "MedMCQA-Validation")


class MedMCQA:
    """The embedded data source; ``data.path`` and the column keys do not matter."""

    def __init__(self, config: DataConfig) -> None:
        self._config = config

    def task_names(self) -> tuple[str, ...]:
        """Return ``data.tasks``, or the five tasks."""
        return select_tasks(TASKS, self._config.tasks, "task")

    def load(self, task: str) -> TaskData:
        """Return a task; at least 60 and at most 600 questions per label before limits.

        Raises:
            UserError: unknown task, or the data package is missing or incomplete.
        """
        labels = choose("task", task, TASKS)
        questions = _questions_by_specialty(asset_folder("medmcqa"))
        train: list[Example] = []
        test: list[Example] = []
        for label in labels:
            texts = sorted(questions[label], key=_order)[:CAP]
            cut = len(texts) // TEST_SHARE
            test += [Example(text, label) for text in texts[:cut]]
            train += [Example(text, label) for text in texts[cut:]]
        return limited(TaskData(task, labels, _mixed(train), _mixed(test)), self._config)


@lru_cache(maxsize=1)
def _questions_by_specialty(folder: Path) -> Mapping[str, tuple[str, ...]]:
    """Return each specialty's texts without repeats; of a package's files, read once a process.

    Of one specialty's repeats one stays; a question filed under two specialties is
    ambiguous, and all its copies go.
    """
    labels: defaultdict[str, set[str]] = defaultdict(set)
    text_of: dict[str, str] = {}
    for label, text in _read(folder):
        labels[_key(text)].add(label)
        text_of.setdefault(_key(text), text)
    questions: defaultdict[str, list[str]] = defaultdict(list)
    for key, found in labels.items():
        if len(found) == 1:
            questions[found.pop()].append(text_of[key])
    return MappingProxyType({label: tuple(texts) for label, texts in questions.items()})


def _read(folder: Path) -> Iterator[tuple[str, str]]:
    paths = [path for name in FOLDERS for path in sorted((folder / name).glob("*.jsonl"))]
    if not paths:
        raise UserError(f"{folder}: holds no MedMCQA questions; run {cure()}")
    for path in paths:
        label = path.stem.replace("_", " ")
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            yield label, f"{_spaced(row['question'])}\n{_spaced(row['options'])}"


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _key(text: str) -> str:
    # The bag of words: repeats differ in case, punctuation or the order of the options.
    return " ".join(sorted(re.findall(r"\w+", text.lower())))


def _order(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _mixed(examples: list[Example]) -> tuple[Example, ...]:
    # A second hash: in the order of the first, the cap and the split would show.
    return tuple(sorted(examples, key=lambda example: _order(f"mixed {example.text}")))
