"""A row of any table, checked and turned into an example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deal_core.config.data import DataConfig, HubTask, TaskColumns
from deal_core.data.look_alike import same_person
from deal_core.data.source import Example
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
