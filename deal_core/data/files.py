"""An institution's own data: ``path/TASK/{train,test}.{jsonl,csv,tsv,parquet,xlsx}``.

:class:`FilesSource` reads them for a simulation, and tells of every row that is wrong.
:class:`SiteSource` reads them at a site, where what is in a row stays a matter of that row.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TypeAlias

from deal_core.config.data import DataConfig, TaskColumns
from deal_core.data import source
from deal_core.data.rows import (
    Columns,
    EmptyRow,
    groups_of,
    require_columns,
    same_person,
    shaped,
    to_example,
)
from deal_core.data.tables import READERS, read_table
from deal_core.errors import UserError, at_home, choose, nearest

Refuse: TypeAlias = Callable[[UserError], object]
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
        folder = self._folder()
        found = task_folders(folder)
        if not found:
            raise UserError(f"{folder}: holds no task; make one folder per task in it")
        return source.select_tasks(found, self._config.tasks, f"task in {folder}:")

    def load(self, task: str) -> source.TaskData:
        """Return a task; its labels are those of ``data.labels``, or of the training file, sorted.
        A task of ``data.labels`` without a folder has no examples here.

        Raises:
            UserError: unknown task, a missing, doubled, unreadable or empty file, a bad
                row, or a label that is not one of the task's. The message names file and row.
        """
        data = self._task(task, _raised)
        return source.limited(replace(data, groups=self._groups), self._config)

    def examine(self, task: str) -> tuple[source.TaskData, list[UserError]]:
        """Return what can be read of a task, without limits, and all that is wrong with it.

        Raises:
            UserError: unknown task.
        """
        problems: list[UserError] = []
        return self._task(task, problems.append), problems

    def _task(self, task: str, refuse: Refuse) -> source.TaskData:
        folder, labels = self._folder(), self._config.labels.get(task, ())
        # Compared with what is listed, not looked up: a task's name must not lead elsewhere.
        if labels and task not in task_folders(folder):
            return source.TaskData(task, labels, (), ())
        source.select_tasks(self.task_names(), (task,), f"task in {folder}:")
        refused: list[UserError] = []
        empty: list[UserError] = []

        def note(error: UserError) -> None:
            if isinstance(error, EmptyRow):
                empty.append(error)
            else:
                refused.append(error)
                refuse(error)

        texts = task in self._config.generation
        known = None if texts or not labels else labels
        train = self._split(task, "train", known, note)
        if not labels and not texts:
            labels = tuple(sorted(set[str]().union(*(example.labels for example in train))))
            # Of a training file that could not be read the labels are not known.
            known = None if refused else labels
        held_out = bool(self._config.split) and not split_files(folder / task, "test")
        if held_out:
            train, test = source.split_off(train, self._config.split)
        else:
            test = self._split(task, "test", known, note)
        return source.TaskData(task, labels, train, test, left_out=len(empty), held_out=held_out)

    def _split(
        self, task: str, split: str, known: Collection[str] | None, refuse: Refuse
    ) -> tuple[source.Example, ...]:
        """Return a split's examples; none where the file itself is refused."""
        try:
            path = self._file(self._folder() / task, split)
            return read_examples(path, task, self._config, self._unit_column, known, refuse, True)
        except UserError as error:
            refuse(error)
            return ()

    def _file(self, folder: Path, split: str) -> Path:
        try:
            return split_file(folder, split)
        except UserError as error:
            if split == "test" and not split_files(folder, split):
                cure = "or set data.split = 0.2 to take it from the training file"
                raise UserError(f"{error}, {cure}") from None
            raise

    def _folder(self) -> Path:
        if not self._config.path:
            raise UserError('data.source = "files" needs data.path, a folder of task folders')
        folder = at_home(self._config.path)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; set data.path to the folder of the tasks")
        return folder

    @cached_property
    def _groups(self) -> tuple[str, ...]:
        return groups_of(self._config, (self._task(task, _raised) for task in self.task_names()))


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
            self._labels(task)
        return self._config.tasks or tuple(self._config.labels)

    def load(self, task: str) -> source.TaskData:
        """Return a task's usable rows; none where there is no folder of its name.

        Raises:
            UserError: the task is not declared, or a file is missing, doubled or no table.
        """
        labels, folder = self._labels(task), Path(self._config.path)
        # Compared with what is listed, not looked up: a task's name must not lead elsewhere.
        if task not in task_folders(folder):
            return source.TaskData(task, labels, (), ())
        known = None if task in self._config.generation else labels
        left_out: list[UserError] = []

        def rows(split: str) -> tuple[source.Example, ...]:
            path = split_file(folder / task, split)
            return read_examples(
                path, task, self._config, self._unit_column, known, left_out.append
            )

        train = rows("train")
        held_out = bool(self._config.split) and not split_files(folder / task, "test")
        if held_out:
            train, test = source.split_off_each(train, self._config.split)
        else:
            test = rows("test")
        return source.TaskData(task, labels, train, test, left_out=len(left_out), held_out=held_out)

    def _labels(self, task: str) -> tuple[str, ...]:
        return choose("task in [data.labels] of site.toml:", task, self._config.labels)


def read_examples(
    path: Path,
    task: str,
    config: DataConfig,
    unit_column: str,
    known: Collection[str] | None,
    refuse: Refuse,
    whole: bool = False,
) -> tuple[source.Example, ...]:
    """Return the examples of the rows that can be used.

    Args:
        path: of a table.
        task: decides, with ``config`` and ``unit_column``, which columns are read.
        config: of the data.
        unit_column: empty: none.
        known: labels that a row may have; None: any.
        refuse: hears of each row that cannot be used.
        whole: also refuse the file as a whole: no rows, or columns that its header, or every row,
            lacks.

    Raises:
        UserError: the file cannot be read.
    """
    columns = Columns.of(config, task, unit_column)
    label_text = config.files.get(task, TaskColumns()).label_text
    examples: list[source.Example] = []
    known = None if known is None else tuple(sorted(known))
    pair = columns.second[0]
    filled, unseen = False, {columns.references, pair}  # a row may have none, not every row
    for rows, (number, values) in enumerate(read_table(path), start=1):
        unseen.difference_update(values)
        if whole and rows == 1 and path.suffix.lower() != ".jsonl":
            require_columns(list(shaped(values, columns)), columns, str(path))
        try:
            example = to_example(values, columns, str(path), number, label_text)
            for label in () if known is None else sorted(example.labels.difference(known)):
                raise UserError(f"{path}, row {number}: {no_label(label, known)}")
            examples.append(example)
        except UserError as error:
            filled = filled or not isinstance(error, EmptyRow)
            refuse(error)
    if whole and not (examples or filled):
        raise UserError(f"{path}: holds no examples; add some or leave the task out")
    for column in sorted(unseen - {""}) if whole else ():
        key = "pair" if column == pair else "references"
        refuse(UserError(f"{path}: no row has the column '{column}'; set data.{key}_column"))
    return tuple(examples)


@lru_cache(maxsize=1024)
def no_label(label: str, known: tuple[str, ...]) -> str:
    """Return what is wrong with a label that is not known."""
    return (
        f"'{label}' is no label of the task (they are: {', '.join(known)}{nearest(label, known)}); "
        "correct it, or map it in label_text"
    )


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
    """Return all files of a split; :class:`UserError`: the folder cannot be read."""
    try:
        return [path for suffix in READERS if (path := folder / f"{split}{suffix}").is_file()]
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from None


# Columns that look as if they said whose a record is, and name somebody more than once: where
# single records are protected, an epsilon of one record is then not one of a person. A hint,
# guessed from names of columns.
PEOPLE = (
    *("patient", "person", "subject", "user", "member", "customer", "client", "case", "author"),
    *("speaker", "participant", "individual", "household"),
)
NUMBERS = ("id", "ids", "uid", "uuid", "guid", "pid", "mrn", "ssn", "number", "no", "nr", "key")
ALONE = ("id", "uid", "uuid", "guid", "pid", "mrn", "ssn")
"""Words that name somebody without a word for people beside them."""
OTHERS = ("label", "class", "category", "task", "topic", "intent", "language", "lang", "split")
"""Words beside ``id`` that make it a number of something else."""
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


@lru_cache(maxsize=1024)
def looks_like_identifier(column: str) -> bool:
    """Return whether a column's name is that of a number, or name, of a person: ``patient_id``,
    ``PatientID``, ``subject``, ``mrn``; not ``label_id``, ``grid``."""
    words = [word.lower() for word in WORD.findall(column)]
    if not words or not set(OTHERS).isdisjoint(words):
        return False
    if words[-1] in PEOPLE or words[-1] in ALONE:
        return True
    if words[-1] in NUMBERS:
        return not set(PEOPLE).isdisjoint(words)
    return any(words[-1] == person + number for person in PEOPLE for number in NUMBERS)


def repeated_identifiers(config: DataConfig) -> Iterator[tuple[str, str]]:
    """Yield the columns of training rows that look like identifiers and repeat a value, task by
    task, each with what was found in words; of files alone. Rows that cannot be read end their
    task: they are told of elsewhere."""
    folder = at_home(config.path)
    if config.source not in ("files", "site") or not folder.is_dir():
        return
    wanted = config.tasks or (tuple(config.labels) if config.source == "site" else ())
    for task in task_folders(folder):
        if wanted and task not in wanted:
            continue
        columns = Columns.of(config, task)
        used = {columns.text, columns.label, columns.second[0], columns.target}
        found: defaultdict[str, Counter[str]] = defaultdict(Counter)
        try:
            for _, row in read_table(split_file(folder / task, "train")):
                for column, value in row.items():
                    name = str(column)
                    if value not in (None, "") and name not in used and looks_like_identifier(name):
                        found[name][same_person(str(value))] += 1
        except UserError:
            continue
        for name, values in sorted(found.items()):
            rows = values.total()
            if rows > len(values):
                yield (
                    name,
                    f"column '{name}' of task '{task}' has {len(values)} values in {rows} training "
                    f"rows (one of them in {max(values.values())})",
                )
