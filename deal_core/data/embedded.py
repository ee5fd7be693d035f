"""Tasks of both kinds, embedded: MedMCQA's five choose a specialty; one writes a text.

``research-question``: the question that a paper asks, from the abstract that answers it. 1,000
abstracts of PubMedQA (MIT); their answers yes, no and maybe are not used. One in five is for
testing; the split is the same on every machine.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path

from deal_core.config.data import DataConfig
from deal_core.data.assets import asset_folder, cure
from deal_core.data.medmcqa import TASKS, MedMCQA
from deal_core.data.source import Example, TaskData, limited, select_tasks
from deal_core.errors import UserError

RESEARCH_QUESTION = "research-question"
TEST_SHARE = 5
"""One abstract in this many is for testing."""
FOLDERS = ("pqal", "pqaa")


class EmbeddedTasks:
    """The embedded data of both kinds; ``data.path`` and the column keys do not matter."""

    def __init__(self, config: DataConfig) -> None:
        self._config = config

    def task_names(self) -> tuple[str, ...]:
        """Return ``data.tasks``, or all."""
        return select_tasks((*TASKS, RESEARCH_QUESTION), self._config.tasks, "task")

    def load(self, task: str) -> TaskData:
        """Return a task.

        Raises:
            UserError: unknown task, the data package is missing or incomplete, or
                ``research-question`` is not in ``data.generation``, or another task is.
        """
        if task != RESEARCH_QUESTION:
            if task in self._config.generation:
                raise UserError(f"task '{task}': its answers are labels; leave data.generation")
            return MedMCQA(self._config).load(task)
        if task not in self._config.generation:
            raise UserError(
                f"task '{task}': its answers are texts; add it to data.generation = [\"{task}\"]"
            )
        examples = _abstracts(asset_folder("pubmedqa"))
        cut = len(examples) // TEST_SHARE
        return limited(TaskData(task, (), examples[cut:], examples[:cut]), self._config)


@lru_cache(maxsize=1)
def _abstracts(folder: Path) -> tuple[Example, ...]:
    """Return abstracts with their questions, each question once, in an order that depends on them
    alone.

    Raises:
        UserError: the data package is incomplete.
    """
    paths = [path for name in FOLDERS for path in sorted((folder / name).glob("test.jsonl"))]
    if not paths:
        raise UserError(f"{folder}: holds no PubMedQA abstracts; run {cure()}")
    found: dict[str, str] = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found.setdefault(" ".join(row["question"].split()), _plain(row["passage"]))
    questions = sorted(found, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    return tuple(Example(found[text], "", target=text) for text in questions)


def _plain(passage: str) -> str:
    """Return the abstract without the numbers of its parts."""
    return " ".join(re.sub(r"Context \(\d+\):", " ", passage).split())
