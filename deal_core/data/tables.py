"""Rows of JSONL, CSV, Parquet, Excel and CoNLL files, one at a time, each with its number."""

import csv
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Any, TypeAlias

from deal_core.errors import UserError

Row: TypeAlias = tuple[int, Mapping[str, Any]]
"""Number and values. The number is the line of the file, from 1, or the row of an Excel sheet; of a
Parquet file, which has no lines, the row, from 1."""

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
"""Of a CSV file: the one that its header has most of; of equal ones the first."""
LONGEST_FIELD = 2**31 - 1
"""Characters of a CSV field, all that a C long holds everywhere: a text that is long and well
quoted is no reason to read nothing of the file."""


def _check_names(names: Sequence[str], where: str) -> None:
    """Refuse two columns of one name: a value would have two meanings."""
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{where}: column '{name}' occurs twice; rename one")


def _named(header: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """Return a row; a column without a name, as spreadsheets leave them, is passed over."""
    return {name: value for name, value in zip(header, values, strict=True) if name}


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            values = json.loads(line, parse_int=_integer)
        except (ValueError, RecursionError) as error:
            fault = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deep"
            raise UserError(
                f"{path}, row {number}: not valid JSON ({fault}); write one object per line"
            ) from None
        if not isinstance(values, dict):
            raise UserError(f"{path}, row {number}: not a JSON object; write one object per line")
        yield number, values


def _integer(digits: str) -> int | str:
    """Return a whole number; the digits where Python makes no number of so many: they are text, and
    no reason to read nothing of the file."""
    try:
        return int(digits)
    except ValueError:
        return digits


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number and text of the lines that are not blank, without white space around them."""
    for number, line in _lines(path):
        if line.strip():
            yield number, line.strip()


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    # Decoded line by line, so that the message can name the line.
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}, row {number}: not UTF-8 text; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); check its permissions"
        ) from None


def _read_csv(path: Path) -> Iterator[Row]:
    """Yield the rows below the header; the number of one that spans lines is its first line."""
    csv.field_size_limit(LONGEST_FIELD)  # of the whole process
    numbered = _lines(path)
    number, first = next(((n, line) for n, line in numbered if line.strip()), (1, ""))
    outside_quotes = "".join(first.split('"')[::2])
    delimiter = max(DELIMITERS, key=outside_quotes.count)
    lines = chain([first], (line for _, line in numbered))
    reader = csv.reader(lines, strict=True, delimiter=delimiter)
    before, header, held = number - 1, list[str](), DELIMITERS[delimiter]
    while True:
        number = before + reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            problem = (
                f" ({error}); quote fields with {held}, quotes or line breaks, and double the "
                'quotes inside ("")'
            )
            if "unexpected end of data" in str(error):
                problem = ": its quotes are never closed; close them"
            raise UserError(f"{path}, row {number}: not valid CSV{problem}") from None
        if fields is None:
            return
        if not any(field.strip() for field in fields):
            continue
        if not header:
            header = [field.strip() for field in fields]
            _check_names([name for name in header if name], f"{path}, row {number}")
        elif len(fields) != len(header):
            raise UserError(
                f"{path}, row {number}: {len(fields)} fields, but the header has {len(header)}; "
                f"quote fields that hold {held}"
            )
        else:
            yield number, _named(header, fields)


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _check_names(names, str(path))
            for batch in file.iter_batches(batch_size=1024):
                for values in zip(*map(_values, batch.columns), strict=True):
                    number += 1
                    yield number, dict(zip(names, values, strict=True))
    except UserError:
        raise
    # ValueError: the name of a column is not UTF-8.
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"{path}, row {number + 1}: not a readable Parquet file ({_reason(error)}); "
            "write it again"
        ) from None


def _values(column: Any) -> list[Any]:
    """Return the values of a column. One that Python lacks (bytes that are not UTF-8, a year above
    9999) is the error that says so: it harms those alone who read it."""
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError):  # pyarrow's are ValueErrors
        return [_value(each) for each in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError) as error:
        return error


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


DAMAGED = (
    *(OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError),
    *(SyntaxError, ValueError, TypeError, LookupError),
)
"""Raised while a workbook is read: by what unpacks it; and by the readers of its XML, where that is
cut off (``ParseError`` is a ``SyntaxError``), or names and numbers in it are wrong."""


def _read_excel(path: Path) -> Iterator[Row]:
    """Yield the rows below the header of the first sheet, each with its number there."""
    import pandas

    try:
        # Objects: a column of whole numbers with a gap must not become 1.0, nor the word NA a gap.
        # Without a header: pandas would rename a column whose name is there twice.
        sheet = pandas.read_excel(
            path, header=None, dtype=object, keep_default_na=False, engine="openpyxl"
        )
    except DAMAGED as error:
        raise UserError(
            f"{path}: not a readable Excel workbook ({_reason(error)}); "
            "save it again as .xlsx, or as CSV"
        ) from None
    header: list[str] = []
    for number, values in enumerate(sheet.itertuples(index=False, name=None), start=1):
        if not any(value not in (None, "") for value in values):
            continue
        if header:
            yield number, _named(header, values)
        else:
            header = ["" if value is None else str(value).strip() for value in values]
            _check_names([name for name in header if name], f"{path}, row {number}")


def _read_conll(path: Path) -> Iterator[Row]:
    """Yield the texts between blank lines: the first column has words, the last one their tags."""
    for filled, lines in groupby(_lines(path), lambda numbered: bool(numbered[1].strip())):
        numbers, columns = zip(*((number, line.split()) for number, line in lines), strict=True)
        if filled and columns[0][0] != "-DOCSTART-":
            words, tags = ([each[place] for each in columns] for place in (0, -1))
            yield numbers[0], {"tokens": words, "tags": tags}


READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".xlsx": _read_excel,
    ".conll": _read_conll,
}
"""End of a file's name to reader."""


def read_table(path: Path) -> Iterator[Row]:
    """Yield the rows of a file of ``READERS``.

    Raises:
        UserError: unreadable or damaged file, bytes that are not UTF-8, a repeated column, a row
            that is none; the message names file and row.
    """
    yield from READERS[path.suffix.lower()](path)
