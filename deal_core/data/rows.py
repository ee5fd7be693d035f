"""A row of any table, checked and turned into an example: the columns that are read, what is said
where one is missing, and spellings that mean the same.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from deal_core.config.data import DataConfig, HubTask, TaskColumns
from deal_core.data.source import Example, TaskData
from deal_core.data.tags import read_tagged
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
    tags: str = ""

    @property
    def second(self) -> tuple[str, str]:
        """The column of the second text (empty: none), and the words before that text.

        Raises:
            UserError: ``pair`` has braces, and is not words and then one ``{column}``.
        """
        named = re.fullmatch(r"([^{}]*)\{([^{}]+)\}", self.pair)
        if named is None and not {"{", "}"}.isdisjoint(self.pair):
            raise UserError(
                f"data.pair_column '{self.pair}': write a column's name, or words and then the "
                'name in braces, such as "Question: {question}"'
            )
        return (named[2], named[1]) if named else (self.pair, "")

    def used(self) -> dict[str, str]:
        """Return what is read: its use to the column's name."""
        return {use: name for use, name in {**vars(self), "pair": self.second[0]}.items() if name}

    @classmethod
    def of(
        cls,
        config: DataConfig,
        task: str,
        unit_column: str = "",
        own: TaskColumns | HubTask | None = None,
    ) -> Columns:
        """Return the columns of a task that ``config`` names, or that are its ``own``: of a hub's
        data set, or, where None, of its files. Values of ``unit_column`` make the groups that are
        protected."""
        own = own or config.files.get(task, TaskColumns())
        texts, tagged = task in config.generation, config.tagged(task)
        return cls(
            "tokens" if tagged else own.text_column or config.text_column,
            "" if texts or tagged else own.label_column or config.label_column,
            "" if tagged else own.pair_column or config.pair_column,
            group_column(config),
            config.id_column,
            (own.target_column or config.target_column) if texts else "",
            own.references_column if texts else "",
            unit_column,
            "tags" if tagged else "",
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


def groups_of(config: DataConfig, tasks: Iterable[TaskData]) -> tuple[str, ...]:
    """Return all values of the partition column, sorted; none, and no task is read, where the
    partition is of another kind."""
    if not group_column(config):
        return ()
    return tuple(sorted({e.group for task in tasks for e in (*task.train, *task.test)}))


def require_columns(names: Collection[str], columns: Columns, where: str) -> None:
    """Check that a table has the columns.

    Raises:
        UserError: some are not there; the message starts with ``where`` and names all of them, and
            the keys that do.
    """
    absent = {use: name for use, name in columns.used().items() if name not in names}
    if absent:
        lacking = " or ".join(f"'{name}'" for name in dict.fromkeys(absent.values()))
        keys = " and ".join(KEYS.get(use, f"data.{use}_column") for use in absent)
        listed = ", ".join(map(str, names))
        near = nearest(next(iter(absent.values())), names)
        raise UserError(
            f"{where}: no column {lacking}; the columns are: {listed}; set {keys}{near}"
        )


KEYS = {
    "group": "data.partition.column",
    "unit": "privacy.unit_column (of a site: policy.unit_column)",
}
"""What a column is for to the key that names it, where that is not ``data.USE_column``."""


def to_example(
    row: Mapping[str, Any],
    columns: Columns,
    where: str,
    number: int,
    label_text: Mapping[str, str] | None = None,
) -> Example:
    """Return the example of one row; labels, groups and units are read as text, and a label that
    ``label_text`` has stands for what it has.

    Raises:
        EmptyRow: text, label or target is empty.
        UserError: a column is missing, group or unit is empty, or a value is neither text nor
            number; the message starts with ``where, row number``.
    """
    try:
        row, known, tags = shaped(row, columns), label_text or {}, tuple[str, ...]()
        if columns.tags:
            text, tags = read_tagged(row.get(columns.text), row.get(columns.tags), known)
            row = {**row, columns.text: text}
        text = to_text(row, columns)
        label = _filled(row, columns.label, EmptyRow) if columns.label else ""
        return Example(
            text=text,
            label=known.get(label, label).strip(),
            group=_identity(row, columns.group) if columns.group else "",
            id=same_person(_identity(row, columns.id)) if columns.id else "",
            target=_filled(row, columns.target, EmptyRow) if columns.target else "",
            references=_listed(row, columns.references),
            unit=same_person(_identity(row, columns.unit)) if columns.unit else "",
            tags=tags,
        )
    except UserError as error:
        raise type(error)(f"{where}, row {number}: {error}") from None


def shaped(row: Mapping[str, Any], columns: Columns) -> Mapping[str, Any]:
    """Return a row of one of two well-known shapes with text and answer in the ``columns`` that are
    asked for, any other as it is: ``messages`` (chat: the last one is the answer), and
    ``instruction``, ``input``, ``output`` (Alpaca).

    Raises:
        UserError: messages that are none.
    """
    if columns.text in row:
        return row
    if isinstance(turns := row.get("messages"), list):
        if not all(isinstance(t, Mapping) and isinstance(t.get("content"), str) for t in turns):
            raise UserError("column 'messages' holds others than {role, content}; write them so")
        said = [str(turn["content"]) for turn in turns]
        answered = bool(turns) and turns[-1].get("role") == "assistant"
        texts, answer = (said[:-1], said[-1]) if answered else (said, None)
    elif "instruction" in row:
        texts = [_as_text(row, name) for name in ("instruction", "input") if name in row]
        answer = row.get("output")
    else:
        return row
    own = {columns.text: "\n".join(filter(None, texts))}
    if answer is not None:
        own[columns.target or columns.label] = answer
    return {**own, **row}


class EmptyRow(UserError):
    """A row without text, or without answer."""


def to_text(row: Mapping[str, Any], columns: Columns) -> str:
    """Return the text of one row, that of the pair column included.

    Raises:
        UserError: as :func:`to_example`, without the place.
    """
    text = _filled(row, columns.text, EmptyRow)
    column, words = columns.second
    return "\n".join([text, *(f"{words}{second}" for second in _listed(row, column))])


def _listed(row: Mapping[str, Any], column: str) -> tuple[str, ...]:
    """Return the texts of a column of which a row may have none, or several."""
    listed = row.get(column) if column else None
    values = listed if isinstance(listed, list) else [listed]
    return tuple(filter(None, (_as_text({column: value}, column) for value in values)))


def _identity(row: Mapping[str, Any], column: str) -> str:
    """Return which record a row is, whose, or where it is from. A whole number is the same whether
    it was written as 7 or, as some writers do beside missing values, as 7.0."""
    text, value = _filled(row, column), row[column]
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    whole, _, zeros = text.partition(".")
    written = whole.removeprefix("-").isdecimal() and zeros and not zeros.strip("0")
    return whole if written else text


def _filled(row: Mapping[str, Any], column: str, error: type[UserError] = UserError) -> str:
    text = _as_text(row, column)
    if not text:
        raise error(f"column '{column}' is empty; fill it in or remove the row")
    return text


def _as_text(row: Mapping[str, Any], column: str) -> str:
    if column not in row:
        listed = ", ".join(str(name) for name in row)
        raise UserError(f"no column '{column}'; the columns are: {listed}{nearest(column, row)}")
    value = row[column]
    if value is None or value != value:  # NaN is how some writers spell "missing"
        return ""
    if isinstance(value, Exception):
        raise UserError(f"column '{column}' holds a value that cannot be read; write it again")
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
