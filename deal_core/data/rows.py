"""A row of any table, checked and turned into an example: the columns that are read, what is said
where one is missing, and spellings that mean the same.
"""

from __future__ import annotations

import difflib
import json
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deal_core.config.data import DataConfig, HubTask, TaskColumns
from deal_core.data.source import Example
from deal_core.data.tables import read_table
from deal_core.errors import UserError, nearest


@dataclass(frozen=True)
class Columns:
    """Names of the columns that make an example; empty: not used."""

    text: str
    label: str
    pair: str = ""
    group: str = ""
    id: str = ""
    target: str = ""
    references: str = ""
    unit: str = ""

    @classmethod
    def of(
        cls,
        config: DataConfig,
        task: str,
        unit_column: str = "",
        own: TaskColumns | HubTask | None = None,
    ) -> Columns:
        """Return the columns of a task.

        Args:
            config: names them.
            task: may have columns of its own.
            unit_column: whose values make the groups that are protected; empty: none are.
            own: the task's own; None: those of its files.

        Raises:
            UserError: the partition is by column, but names none.
        """
        own = own or config.files.get(task, TaskColumns())
        texts = task in config.generation
        return cls(
            own.text_column or config.text_column,
            "" if texts else own.label_column or config.label_column,
            own.pair_column or config.pair_column,
            group_column(config),
            config.id_column,
            (own.target_column or config.target_column) if texts else "",
            (own.references_column or config.references_column) if texts else "",
            unit_column,
        )


def group_column(config: DataConfig) -> str:
    """Return the partition column; empty when the partition is of another kind.

    Raises:
        UserError: the partition is by column, but names none.
    """
    if config.partition.kind != "column":
        return ""
    if not config.partition.column:
        raise UserError('data.partition.kind = "column" needs data.partition.column')
    return config.partition.column


def to_example(row: Mapping[str, Any], columns: Columns, where: str, number: int) -> Example:
    """Return the example of one row; labels, groups and units are read as text.

    Raises:
        UserError: a column is missing, the text, label, group or unit is empty, or a value is
            neither text nor number; the message starts with ``where, row number``.
    """
    try:
        text = to_text(row, columns)
        group = _identity(row, columns.group) if columns.group else ""
        own = same_person(_identity(row, columns.id)) if columns.id else ""
        unit = same_person(_identity(row, columns.unit)) if columns.unit else ""
        if not columns.label:
            target = _filled(row, columns.target)
            return Example(text, "", group, own, target, _references(row, columns), unit)
        return Example(text, _filled(row, columns.label), group, own, unit=unit)
    except UserError as error:
        raise UserError(f"{where}, row {number}: {error}") from None


def to_text(row: Mapping[str, Any], columns: Columns) -> str:
    """Return the text of one row, that of the pair column included.

    Raises:
        UserError: as :func:`to_example`, without the place.
    """
    text = _filled(row, columns.text)
    if columns.pair:
        text = f"{text}\n{_as_text(row, columns.pair)}".rstrip("\n")
    return text


def _references(row: Mapping[str, Any], columns: Columns) -> tuple[str, ...]:
    if not columns.references:
        return ()
    listed = row.get(columns.references)
    values = listed if isinstance(listed, list) else [listed]
    texts = (_as_text({columns.references: value}, columns.references) for value in values)
    return tuple(text for text in texts if text)


def _identity(row: Mapping[str, Any], column: str) -> str:
    """Return which record a row is, whose, or where it is from. A whole number is the same whether
    it was written as 7 or, as some writers do beside missing values, as 7.0."""
    text, value = _filled(row, column), row[column]
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    whole, _, zeros = text.partition(".")
    written = whole.removeprefix("-").isdecimal() and zeros and not zeros.strip("0")
    return whole if written else text


def _filled(row: Mapping[str, Any], column: str) -> str:
    text = _as_text(row, column)
    if not text:
        raise UserError(f"column '{column}' is empty; fill it in or remove the row")
    return text


def _as_text(row: Mapping[str, Any], column: str) -> str:
    if column not in row:
        listed = ", ".join(str(name) for name in row)
        raise UserError(f"no column '{column}'; the columns are: {listed}{nearest(column, row)}")
    value = row[column]
    if value is None or value != value:  # NaN is how some writers spell "missing"
        return ""
    if not isinstance(value, (str, int, float)):
        found = type(value).__name__
        raise UserError(f"column '{column}' holds a {found}; it should hold text or numbers")
    return whole_characters(str(value).strip(), f"column '{column}'")


def whole_characters(text: str, where: str) -> str:
    """Return the text, which no tokeniser takes with half of a character in it.

    Raises:
        UserError: there is; the message starts with ``where``.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where} holds half a character, which is no text; write it anew"
        ) from None
    return text


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
    lower = {each.casefold(): each for each in known}
    close = difflib.get_close_matches(name.casefold(), lower, n=1, cutoff=ALIKE)
    if close:
        return f"{key} = {json.dumps(lower[close[0]], ensure_ascii=False)}"
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


INVISIBLE = "Cf"
"""Unicode's category of characters that are not shown."""


def folded(label: str) -> str:
    """Return what labels that look alike have in common: without case, blanks, ``_``, invisible
    characters, forms of one letter, and ``.0`` behind a whole number."""
    text = " ".join(_plain(label).replace("_", " ").split())
    whole = text.removesuffix(".0")
    return whole if whole.removeprefix("-").isdecimal() else text


def same_person(value: str) -> str:
    """Return what the spellings of one person's name or number have in common: without case,
    further blanks, invisible characters, forms of one letter, and zeros before a whole number."""
    text = " ".join(_plain(value).split())
    return text.lstrip("0") or "0" if text.isdecimal() else text


def _plain(text: str) -> str:
    """The text without case, invisible characters, and forms of one letter."""
    plain = unicodedata.normalize("NFKC", text)
    shown = "".join(c for c in plain if unicodedata.category(c) != INVISIBLE)
    return unicodedata.normalize("NFKC", shown.casefold())


def look_alike(label: str, labels: Iterable[str]) -> str:
    """Return a hint at the first of some labels that looks like this one; empty: none does."""
    form = folded(label)
    for other in labels:
        if other != label and folded(other) == form:
            return f" ({other!a} looks alike; this one is {label!a})"
    return ""
