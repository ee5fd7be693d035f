"""A site's own files as a run reads them: what the site has declared; and whatever is in a row
stays a matter of that row.

A row that cannot be used, or whose label is none of the task's, is left out and counted; the other
rows do not depend on it. Nothing that an experiment says (limits, shares) takes rows away: which
records there are is the site's to say, and an answer must not depend on who asks for how many.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from deal_core.config.data import DataConfig, TaskColumns
from deal_core.data.files import SPLITS, split_file, split_files, task_folders
from deal_core.data.rows import Columns, to_example
from deal_core.data.source import Example, TaskData
from deal_core.data.split import split_off_each
from deal_core.data.tables import read_table
from deal_core.errors import UserError, choose


class SiteSource:
    """One folder per task below ``data.path``; tasks and labels are those of ``data.labels``."""

    def __init__(self, config: DataConfig, unit_column: str = "") -> None:
        self._config, self._unit_column = config, unit_column

    def task_names(self) -> tuple[str, ...]:
        """Return ``data.tasks``, each of which is declared.

        Raises:
            UserError: one is not.
        """
        for task in self._config.tasks:
            choose("task in [data.labels] of site.toml:", task, self._config.labels)
        return self._config.tasks or tuple(self._config.labels)

    def load(self, task: str) -> TaskData:
        """Return a task's usable rows; none where there is no folder of its name.

        Raises:
            UserError: the task is not declared, or a file is missing, doubled or no table.
        """
        choose("task in [data.labels] of site.toml:", task, self._config.labels)
        labels = self._config.labels[task]
        folder = Path(self._config.path)
        # Compared with what is listed, not looked up: a task's name must not lead elsewhere.
        if task not in task_folders(folder):
            return TaskData(task, labels, (), ())
        if self._config.split and not split_files(folder / task, "test"):
            examples, left_out = self._read(folder / task, task, "train")
            sides = split_off_each(examples, self._config.split)
            return TaskData(task, labels, *sides, left_out=left_out, held_out=True)
        train, test = (self._read(folder / task, task, split) for split in SPLITS)
        left_out = train[1] + test[1]
        return TaskData(task, labels, tuple(train[0]), tuple(test[0]), left_out=left_out)

    def _read(self, folder: Path, task: str, split: str) -> tuple[list[Example], int]:
        """Usable rows, and the number of the others."""
        columns = Columns.of(self._config, task, self._unit_column)
        known = frozenset(self._config.labels[task])
        texts = task in self._config.generation
        mapped = self._config.files.get(task, TaskColumns()).label_text
        path = split_file(folder, split)
        examples: list[Example] = []
        left_out = 0
        for number, values in read_table(path):
            try:
                example = to_example(values, columns, str(path), number)
            except UserError:
                left_out += 1
                continue
            label = mapped.get(example.label, example.label).strip()
            if texts or label in known:
                examples.append(replace(example, label=label))
            else:
                left_out += 1
        return examples, left_out
