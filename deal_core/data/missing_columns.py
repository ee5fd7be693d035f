"""Columns that no row of a table has: one line for all of them, with the keys that name others."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deal_core.config.data import DataConfig, HubTask, TaskColumns
from deal_core.data.rows import Columns
from deal_core.data.tables import read_table
from deal_core.errors import UserError

ALIKE = 0.7
"""Of two names, from which the one is offered for the other."""
OF_ALL_TASKS = {"group": "data.partition.column", "id": "data.id_column"}
"""What a column is for to its key, where a task has none of its own."""


@dataclass(frozen=True)
class ColumnKeys:
    """The keys that name the columns of a task.

    Attributes:
        config: has them.
        task: may have keys of its own.
        own: the task's own columns; None: it has none.
    """

    config: DataConfig
    task: str
    own: TaskColumns | HubTask | None

    def __getitem__(self, use: str) -> str:
        """Return the key that a column is named by, from the field of :class:`Columns`."""
        if use == "unit":
            return "policy.unit_column" if self.config.source == "site" else "privacy.unit_column"
        if use in OF_ALL_TASKS:
            return OF_ALL_TASKS[use]
        table = self.table if self._is_own(use) else "data"
        return f"{table}.{use}_column"

    @property
    def table(self) -> str:
        """Where the task's own keys stand."""
        return f"data.{'hub' if isinstance(self.own, HubTask) else 'files'}.{self.task}"

    def may_be_own(self, uses: Iterable[str]) -> bool:
        """Return whether some key is of all tasks, and the task may have it for itself."""
        shared = {"unit", *OF_ALL_TASKS}
        return any(use not in shared and not self._is_own(use) for use in uses)

    def _is_own(self, use: str) -> bool:
        return bool(getattr(self.own, f"{use}_column", ""))


def missing(columns: Columns, names: Collection[str]) -> dict[str, str]:
    """Return the columns that are not among names: what each is for, and its name."""
    return {use: name for use, name in vars(columns).items() if name and name not in names}


def require_columns(
    path: Path, first: Mapping[str, Any], columns: Columns, keys: ColumnKeys
) -> None:
    """Check that some row of a file has each column; which rows lack one is another matter. So is
    that of further right answers: a row may have none.

    Args:
        path: the file.
        first: its first row.
        columns: that are read.
        keys: that name them.

    Raises:
        UserError: no row has one; the message names all of these.
    """
    absent = missing(replace(columns, references=""), first)
    if absent and ".jsonl" in path.suffixes:  # elsewhere a header says what every row has
        absent = _in_no_row(path, absent)
    if absent:
        raise UserError(missing_line(str(path), first, absent, keys))


def missing_line(
    where: str, names: Iterable[str], absent: Mapping[str, str], keys: ColumnKeys
) -> str:
    """Return what is said of columns that are not there.

    Args:
        where: the table.
        names: of the columns that it has.
        absent: what each column is for, and its name.
        keys: that name them.
    """
    known = [str(name) for name in names]
    lacking = " or ".join(f"'{name}'" for name in dict.fromkeys(absent.values()))
    cures = " and ".join(_cure(keys[use], name, known) for use, name in absent.items())
    alone = f" (for this task alone: in {keys.table})" if keys.may_be_own(absent) else ""
    return f"{where}: no column {lacking}; the columns are: {', '.join(known)}; set {cures}{alone}"


def _cure(key: str, name: str, known: list[str]) -> str:
    folded = {each.casefold(): each for each in known}
    close = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=ALIKE)
    if close:
        return f"{key} = {json.dumps(folded[close[0]], ensure_ascii=False)}"
    return f"{key} to one of them"


def _in_no_row(path: Path, absent: Mapping[str, str]) -> dict[str, str]:
    """Return those of the columns that no row of the file has; none where it cannot be read to its
    end, which is told row by row."""
    left = dict(absent)
    try:
        for _, row in read_table(path):
            left = {use: name for use, name in left.items() if name not in row}
            if not left:
                break
    except UserError:
        return {}
    return left
