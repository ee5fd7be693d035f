"""Columns that look as if they said whose a record is, and name somebody more than once.

Where such a column is there and single records are protected, an epsilon of one record is not one
of a person. Nobody is asked to take the hint: it is a guess from names of columns.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from deal_core.config.data import DataConfig
from deal_core.data.files import split_file, task_folders
from deal_core.data.rows import Columns, same_person
from deal_core.data.tables import read_table
from deal_core.errors import UserError, at_home

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


@dataclass(frozen=True)
class RepeatedIdentifier:
    """A column of a task's training rows.

    Attributes:
        task, column: where.
        rows: with a value in it. values: different ones. most: rows of the commonest.
    """

    task: str
    column: str
    rows: int
    values: int
    most: int

    def __str__(self) -> str:
        return (
            f"column '{self.column}' of task '{self.task}' has {self.values} values in {self.rows} "
            f"training rows (one of them in {self.most})"
        )


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


def repeated_identifiers(config: DataConfig) -> Iterator[RepeatedIdentifier]:
    """Yield the columns of training rows that look like identifiers and repeat a value, task by
    task. Rows that cannot be read end their task: they are told of elsewhere.

    Args:
        config: of files; other sources have nothing to yield.
    """
    folder = at_home(config.path)
    if config.source not in ("files", "site") or not folder.is_dir():
        return
    wanted = config.tasks or (tuple(config.labels) if config.source == "site" else ())
    for task in task_folders(folder):
        if wanted and task not in wanted:
            continue
        columns = Columns.of(config, task)
        used = frozenset({columns.text, columns.label, columns.pair, columns.target})
        try:
            rows = read_table(split_file(folder / task, "train"))
        except UserError:
            continue
        yield from _repeated(task, (row for _, row in rows), used)


def _repeated(
    task: str, rows: Iterable[Mapping[str, Any]], used: frozenset[str]
) -> Iterator[RepeatedIdentifier]:
    found: dict[str, Counter[str]] = {}
    try:
        for row in rows:
            for column in row:
                known = str(column)
                if known in used or not looks_like_identifier(known):
                    continue
                if (value := row[column]) not in (None, ""):
                    found.setdefault(known, Counter())[same_person(str(value))] += 1
    except UserError:
        return
    for column, values in sorted(found.items()):
        if values.total() > len(values):
            yield RepeatedIdentifier(
                task, column, values.total(), len(values), max(values.values())
            )


def alike_people(values: Iterable[str]) -> list[list[str]]:
    """Return values, as :func:`same_person` has them, that differ in other characters than letters
    and digits alone."""
    alike: dict[str, set[str]] = {}
    for value in values:
        alike.setdefault("".join(filter(str.isalnum, value)) or value, set()).add(value)
    return [sorted(some) for some in alike.values() if len(some) > 1]
