"""The texts that ``deal predict`` answers: as they are typed, or from a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deal_core.data.rows import Columns, to_text, whole_characters
from deal_core.data.tables import READERS, read_lines, read_table
from deal_core.errors import UserError


@dataclass(frozen=True)
class Text:
    """A text to answer.

    Attributes:
        text: as the model reads it.
        row: number in its file (:data:`deal_core.data.tables.Row`); None where it was typed.
        expected: its right answer, where the file says one and was asked for it.
    """

    text: str
    row: int | None = None
    expected: str | None = None


def typed_texts(texts: Sequence[str]) -> Iterator[Text]:
    """Yield texts as they are, without the white space around them.

    Raises:
        UserError: an empty one, or one that is no text.
    """
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise UserError(f"text {number} is a {type(text).__name__}; give a string")
        if not text.strip():
            raise UserError(f"text {number} is empty; leave it out")
        yield Text(whole_characters(text.strip(), f"text {number}"))


def file_texts(path: Path, column: str, pair_column: str, label_column: str = "") -> Iterator[Text]:
    """Return the texts of a CSV, JSONL or Parquet file, or the lines of a TXT file, read one at a
    time.

    Args:
        path: the file.
        column: of the text.
        pair_column: joined to it, as ``data.pair_column`` of an experiment; empty: none.
        label_column: of the right answer; empty: it is not asked for.

    Raises:
        UserError: no such file, or of another kind; and, when it is reached, a row without text:
            the message names file and row.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; name one with a text a row")
    suffix = path.suffix.lower()
    if suffix == ".txt" and label_column:
        raise UserError(f"{path}: has no column '{label_column}'; name a table, or leave it out")
    if suffix == ".txt":
        return (Text(line, number) for number, line in read_lines(path))
    if suffix not in READERS:
        known = ", ".join((*READERS, ".txt"))
        raise UserError(f"{path}: files may end in {known}; rename or convert it")
    return _rows(path, Columns(text=column, label=label_column, pair=pair_column))


def _rows(path: Path, columns: Columns) -> Iterator[Text]:
    for number, row in read_table(path):
        try:
            text = to_text(row, columns)
            answer = Columns(text=columns.label, label="")
            expected = to_text(row, answer) if columns.label else None
        except UserError as error:
            raise UserError(f"{path}, row {number}: {error}") from None
        yield Text(text, number, expected)
