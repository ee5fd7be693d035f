"""An institution's own data: ``path/TASK/{train,test}.{jsonl,csv,parquet}``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from deal_core.config.experiment import DataConfig, TaskColumns
from deal_core.data.rows import Columns, group_column, to_example
from deal_core.data.source import Example, TaskData, limited, select_tasks
from deal_core.data.tables import READERS
from deal_core.errors import UserError, nearest

SPLITS = ("train", "test")


class FilesSource:
    """One folder per task; ``data.*_column`` name the columns, ``data.files``
    those of a task that has others; labels are read as text."""

    def __init__(self, config: DataConfig, unit_column: str = "") -> None:
        self._config, self._unit_column = config, unit_column

    def task_names(self) -> tuple[str, ...]:
        """Return ``data.tasks``, or all folders below ``data.path``, sorted.

        Raises:
            UserError: no such folder, no task in it, or an unknown task.
        """
        folder, found = self._folder(), self._task_folders()
        if not found:
            raise UserError(f"{folder}: holds no task; make one folder per task in it")
        return select_tasks(found, self._config.tasks, f"task in {folder}:")

    def load(self, task: str) -> TaskData:
        """Return a task; its labels are those of ``data.labels``, or of the training file, sorted.
        A task of ``data.labels`` without a folder has no examples here.

        Raises:
            UserError: unknown task, a missing, doubled, unreadable or empty file, a bad
                row, or a label that is not one of the task's. The message names file and row.
        """
        declared = self._config.labels.get(task, ())
        # Compared with what is listed, not looked up: a task's name must not lead elsewhere.
        if declared and task not in self._task_folders():
            return TaskData(task, declared, (), (), self._groups)
        select_tasks(self.task_names(), (task,), f"task in {self._folder()}:")
        if task in self._config.generation:
            train, test = (tuple(e for _, e in self._read(task, split)) for split in SPLITS)
        elif declared:
            known = frozenset(declared)
            train, test = (tuple(self._read_known(task, split, known)) for split in SPLITS)
        else:
            train = tuple(example for _, example in self._read(task, "train"))
            declared = tuple(sorted({example.label for example in train}))
            test = tuple(self._read_test(task, frozenset(declared)))
        data = TaskData(task, declared, train, test, self._groups)
        return limited(data, self._config)

    def _task_folders(self) -> list[str]:
        return task_folders(self._folder())

    def _folder(self) -> Path:
        if not self._config.path:
            raise UserError('data.source = "files" needs data.path, a folder of task folders')
        folder = Path(self._config.path).expanduser()
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; set data.path to the folder of the tasks")
        return folder

    @cached_property
    def _groups(self) -> tuple[str, ...]:
        if not group_column(self._config):
            return ()
        splits = [(task, split) for task in self.task_names() for split in SPLITS]
        found = {example.group for place in splits for _, example in self._read(*place)}
        return tuple(sorted(found))

    def _read_known(self, task: str, split: str, labels: frozenset[str]) -> Iterator[Example]:
        for row, example in self._read(task, split):
            if example.label not in labels:
                raise UserError(
                    f"{split_file(self._folder() / task, split)}, row {row}: '{example.label}' "
                    f"is no label of the task (they are: {', '.join(sorted(labels))}"
                    f"{nearest(example.label, labels)}); correct it, or map it in label_text"
                )
            yield example

    def _read_test(self, task: str, labels: frozenset[str]) -> Iterator[Example]:
        for row, example in self._read(task, "test"):
            if example.label not in labels:
                raise UserError(
                    f"{split_file(self._folder() / task, 'test')}, row {row}: no training example "
                    f"has the label '{example.label}'; add one or remove the row"
                )
            yield example

    def _read(self, task: str, split: str) -> Iterator[tuple[int, Example]]:
        columns = Columns.of(self._config, task, self._unit_column)
        mapped = self._config.files.get(task, TaskColumns()).label_text
        path = split_file(self._folder() / task, split)
        empty = True
        for number, values in READERS[path.suffix](path):
            empty = False
            example = to_example(values, columns, str(path), number)
            yield number, replace(example, label=mapped.get(example.label, example.label))
        if empty:
            raise UserError(f"{path}: holds no examples; add some or leave the task out")


def task_folders(folder: Path) -> list[str]:
    """Names of the folders below ``folder``, sorted; hidden ones are none."""
    return sorted(e.name for e in folder.iterdir() if e.is_dir() and not e.name.startswith("."))


def split_file(folder: Path, split: str) -> Path:
    """Return the one file of a split.

    Raises:
        UserError: there is none, or more than one.
    """
    found = [path for suffix in READERS if (path := folder / f"{split}{suffix}").is_file()]
    if not found:
        suffixes = ", ".join(READERS)
        raise UserError(f"{folder}: no file for the split '{split}'; add {split} as {suffixes}")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{folder}: several files for the split '{split}' ({names}); keep one")
    return found[0]
