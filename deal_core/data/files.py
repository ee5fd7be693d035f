"""An institution's own data: ``path/TASK/{train,test}.{jsonl,csv,tsv,parquet,xlsx}``.

:class:`FilesSource` reads them for a simulation, and tells of every row that is wrong.
:class:`SiteSource` reads them at a site, where what is in a row stays a matter of that row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TypeAlias

from deal_core.config.data import DataConfig, TaskColumns
from deal_core.data.rows import (
    Columns,
    group_column,
    look_alike,
    require_columns,
    to_example,
)
from deal_core.data.source import (
    Example,
    TaskData,
    limited,
    select_tasks,
    split_off,
    split_off_each,
)
from deal_core.data.tables import READERS, read_table
from deal_core.errors import UserError, at_home, choose, nearest

SPLITS = ("train", "test")

Refuse: TypeAlias = Callable[[UserError], None]
"""What is done about a problem: it is raised, or noted."""


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
        data = self._task(task, _raised)
        return limited(replace(data, groups=self._groups), self._config)

    def examine(self, task: str) -> tuple[TaskData, list[UserError]]:
        """Return what can be read of a task, without limits, and all that is wrong with it.

        Raises:
            UserError: unknown task.
        """
        problems: list[UserError] = []
        return self._task(task, problems.append), problems

    def _task(self, task: str, refuse: Refuse) -> TaskData:
        labels = self._config.labels.get(task, ())
        # Compared with what is listed, not looked up: a task's name must not lead elsewhere.
        if labels and task not in self._task_folders():
            return TaskData(task, labels, (), ())
        select_tasks(self.task_names(), (task,), f"task in {self._folder()}:")
        refused: list[UserError] = []

        def note(error: UserError) -> None:
            refused.append(error)
            refuse(error)

        texts = task in self._config.generation
        of_labels = (
            partial(_not_declared, frozenset(labels)) if labels and not texts else _no_problem
        )
        train = self._split(task, "train", of_labels, note)
        if not labels and not texts:
            labels = tuple(sorted({example.label for example in train}))
            # Of a training file that could not be read the labels are not known.
            of_labels = _no_problem if refused else partial(_not_learnt, frozenset(labels))
        if self._config.split and not split_files(self._folder() / task, "test"):
            train, test = split_off(train, self._config.split)
            return TaskData(task, labels, train, test, held_out=True)
        return TaskData(task, labels, train, self._split(task, "test", of_labels, note))

    def _split(
        self, task: str, split: str, label_problem: Callable[[str], str], refuse: Refuse
    ) -> tuple[Example, ...]:
        """Return a split's examples; none where the file itself is refused."""
        try:
            path = self._file(task, split)
            examples, empty = [], True
            for number, example in self._rows(task, path, refuse):
                empty = False
                if example is None:
                    continue
                if problem := label_problem(example.label):
                    refuse(UserError(f"{path}, row {number}: {problem}"))
                else:
                    examples.append(example)
            if empty:
                raise UserError(f"{path}: holds no examples; add some or leave the task out")
        except UserError as error:
            refuse(error)
            return ()
        return tuple(examples)

    def _rows(self, task: str, path: Path, refuse: Refuse) -> Iterator[tuple[int, Example | None]]:
        """Yield number and example of every row; None for one that is refused.

        Raises:
            UserError: the file cannot be read, or its header lacks a column.
        """
        columns = Columns.of(self._config, task, self._unit_column)
        mapped = self._config.files.get(task, TaskColumns()).label_text
        has_header = path.suffix.lower() != ".jsonl"
        unseen = columns.references  # a row may have none, but not every row
        for number, values in read_table(path):
            unseen = "" if unseen in values else unseen
            if has_header:
                require_columns(list(values), columns, str(path))
                has_header = False  # it is the same for every row
            try:
                example = to_example(values, columns, str(path), number)
            except UserError as error:
                refuse(error)
                yield number, None
            else:
                label = mapped.get(example.label, example.label).strip()
                yield number, replace(example, label=label)
        if unseen:
            refuse(UserError(f"{path}: no row has the column '{unseen}' of further right answers"))

    def _file(self, task: str, split: str) -> Path:
        folder = self._folder() / task
        try:
            return split_file(folder, split)
        except UserError as error:
            if split == "test" and not split_files(folder, split):
                cure = "or set data.split = 0.2 to take it from the training file"
                raise UserError(f"{error}, {cure}") from None
            raise

    def _task_folders(self) -> list[str]:
        return task_folders(self._folder())

    def _folder(self) -> Path:
        if not self._config.path:
            raise UserError('data.source = "files" needs data.path, a folder of task folders')
        folder = at_home(self._config.path)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; set data.path to the folder of the tasks")
        return folder

    @cached_property
    def _groups(self) -> tuple[str, ...]:
        if not group_column(self._config):
            return ()
        tasks = [self._task(task, _raised) for task in self.task_names()]
        return tuple(sorted({e.group for task in tasks for e in (*task.train, *task.test)}))


def _no_problem(label: str) -> str:
    return ""


def _not_declared(labels: frozenset[str], label: str) -> str:
    if label in labels:
        return ""
    return (
        f"'{label}' is no label of the task (they are: {', '.join(sorted(labels))}"
        f"{nearest(label, labels)}); correct it, or map it in label_text"
    )


def _not_learnt(labels: frozenset[str], label: str) -> str:
    if label in labels:
        return ""
    alike = look_alike(label, sorted(labels))
    return f"no training example has the label '{label}'{alike}; add one or remove the row"


def _raised(error: UserError) -> None:
    raise error


def task_folders(folder: Path) -> list[str]:
    """Return names of the folders below ``folder``, sorted; hidden ones are none.

    Raises:
        UserError: it cannot be read, or one has a name that is no UTF-8.
    """
    try:
        found = [e.name for e in folder.iterdir() if e.is_dir() and not e.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from None
    for name in found:
        if name != name.encode("utf-8", "ignore").decode():
            raise UserError(f"{folder}: a folder's name {name!a} is no UTF-8; rename it")
    return sorted(found)


def split_file(folder: Path, split: str) -> Path:
    """Return the one file of a split.

    Raises:
        UserError: there is none, or more than one.
    """
    found = split_files(folder, split)
    if not found:
        suffixes = ", ".join(READERS)
        raise UserError(f"{folder}: no file for the split '{split}'; add {split} as {suffixes}")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{folder}: several files for the split '{split}' ({names}); keep one")
    return found[0]


def split_files(folder: Path, split: str) -> list[Path]:
    """Return all files of a split.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        return [path for suffix in READERS if (path := folder / f"{split}{suffix}").is_file()]
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from None


class SiteSource:
    """One folder per task below ``data.path``; tasks and labels are those of ``data.labels``.

    A row that cannot be used, or whose label is none of the task's, is left out and counted; the
    other rows do not depend on it. Nothing that an experiment says (limits, shares) takes rows
    away: which records there are is the site's to say, and an answer must not depend on who asks
    for how many.
    """

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
