"""Rows of JSONL, CSV, Parquet and Excel files, one at a time, each with its number."""

from __future__ import annotations

import csv
import gzip
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from deal_core.errors import UserError

if TYPE_CHECKING:
    from pyarrow import Array
    from pyarrow.parquet import ParquetFile


Row: TypeAlias = tuple[int, Mapping[str, Any]]
"""Number and values. The number is the line of the file, from 1, or the row of an Excel sheet; of a
Parquet file, which has no lines, the row, from 1."""

DELIMITERS = ",;\t"
"""Of a ``.csv`` file: the one that its header has most of; of equal ones the first."""
HELD = {",": "commas", ";": "semicolons", "\t": "tabs"}
"""Delimiter to its name."""
GZIP = ".gz"
LONGEST_FIELD = 2**31 - 1
"""Characters of a CSV field, all that a C long holds everywhere: a text that is long and well
quoted is no reason to read nothing of the file."""


def check_names(names: Sequence[str], where: str) -> None:
    """Check that every column has a name of its own; a value would have two meanings.

    Raises:
        UserError: two have the same; the message starts with ``where``.
    """
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{where}: column '{name}' occurs twice; rename one")


def read_jsonl(path: Path) -> Iterator[Row]:
    """Yield one JSON object per line; blank lines are skipped.

    Raises:
        UserError: unreadable file, bytes that are not UTF-8, or a line that is no JSON
            object; the message names file and line.
    """
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            values = json.loads(line, parse_int=_integer)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}, row {number}: not valid JSON ({_fault(error)}); write one object per line"
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


def _fault(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "nested too deep"


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file, without the white space around them; blank ones are
    skipped.

    Raises:
        UserError: unreadable file, or bytes that are not UTF-8; the message names file and line.
    """
    for number, line in _lines(path):
        if line.strip():
            yield number, line.strip()


def read_csv(path: Path) -> Iterator[Row]:
    """Yield the rows below the header of a file whose fields are separated by commas, semicolons or
    tabs; blank lines are skipped.

    The number of a row that spans several lines is its first line.

    Raises:
        UserError: unreadable file, bytes that are not UTF-8, bad quoting, a repeated column or a
            row with more or fewer fields than the header.
    """
    lines = (line for _, line in _lines(path))
    begin: list[str] = []
    for line in lines:
        begin.append(line)
        if line.strip():
            break
    yield from _separated(path, chain(begin, lines), _delimiter("".join(begin)))


def read_tsv(path: Path) -> Iterator[Row]:
    """Yield the rows below the header of a file whose fields are separated by tabs.

    Raises:
        UserError: as :func:`read_csv`.
    """
    yield from _separated(path, (line for _, line in _lines(path)), "\t")


def _delimiter(header: str) -> str:
    """Return the delimiter that a header has most of, outside quotes."""
    outside = "".join(header.split('"')[::2])
    return max(DELIMITERS, key=outside.count)


def _separated(path: Path, lines: Iterator[str], delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_FIELD)  # of the whole process
    reader = csv.reader(lines, strict=True, delimiter=delimiter)
    header: list[str] = []
    number = 1
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            problem = _csv_problem(str(error), HELD[delimiter])
            raise UserError(f"{path}, row {number}: {problem}") from None
        if fields is None:
            return
        blank = not any(field.strip() for field in fields)
        if not blank and not header:
            header = _header(fields, path, number)
        elif not blank:
            yield number, _values(header, fields, path, number, HELD[delimiter])
        number = reader.line_num + 1


def _csv_problem(error: str, held: str) -> str:
    if "unexpected end of data" in error:
        return "not valid CSV: its quotes are never closed; close them"
    return (
        f"not valid CSV ({error}); quote fields with {held}, quotes or line breaks, and double the "
        'quotes inside ("")'
    )


def _header(fields: list[str], path: Path, number: int) -> list[str]:
    header = [field.strip() for field in fields]
    check_names([name for name in header if name], f"{path}, row {number}")
    return header


def _values(
    header: list[str], fields: list[str], path: Path, number: int, held: str
) -> dict[str, str]:
    if len(fields) != len(header):
        raise UserError(
            f"{path}, row {number}: {len(fields)} fields, but the header has {len(header)}; "
            f"quote fields that hold {held}"
        )
    named = dict(zip(header, fields, strict=True))
    named.pop("", None)  # a column without a name, as spreadsheets leave them
    return named


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    # Decoded line by line, so that the message can name the line.
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}, row {number}: not UTF-8 text; save the file as UTF-8") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f"{path}: not a whole gzip file; compress it again") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); check its permissions"
        ) from None


def _opened(path: Path) -> IO[bytes] | gzip.GzipFile:
    return gzip.open(path, "rb") if path.suffix.lower() == GZIP else path.open("rb")


@dataclass(frozen=True, eq=False)
class ParquetRow(Mapping[str, Any]):
    """One row. A value is made when it is asked for: one that is damaged, in a column that nobody
    reads, harms nobody.

    Attributes:
        columns: name to the values of some rows.
        position: of this one among them.
    """

    columns: Mapping[str, Array]
    position: int

    def __getitem__(self, column: str) -> Any:
        """Return the value of a column.

        Raises:
            KeyError: there is no such column.
            UserError: Python has no such value: bytes that are not UTF-8, a year above 9999.
        """
        import pyarrow as pa

        values = self.columns[column]
        try:
            return values[self.position].as_py()
        except (pa.ArrowException, ValueError, OverflowError) as error:
            raise UserError(
                f"column '{column}' holds a value that cannot be read ({_reason(error)}); "
                "write it again"
            ) from None

    def __contains__(self, column: object) -> bool:
        return column in self.columns

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)


def read_parquet(path: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet file; held in memory one batch at a time.

    Raises:
        UserError: unreadable or corrupt file, or a repeated column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for row in _rows(file, path):
                number += 1
                yield number, row
    except UserError:
        raise
    # ValueError: the name of a column is not UTF-8.
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"{path}, row {number + 1}: not a readable Parquet file ({_reason(error)}); "
            "write it again"
        ) from None


def _rows(file: ParquetFile, path: Path) -> Iterator[ParquetRow]:
    names = file.schema_arrow.names
    check_names(names, str(path))
    for batch in file.iter_batches(batch_size=1024):
        columns = dict(zip(names, batch.columns, strict=True))
        yield from (ParquetRow(columns, position) for position in range(batch.num_rows))


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


DAMAGED = (
    *(OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError),
    *(SyntaxError, ValueError, TypeError, LookupError),
)
"""Raised while a workbook is read: by what unpacks it; and by the readers of its XML, where that is
cut off (``ParseError`` is a ``SyntaxError``), or names and numbers in it are wrong."""


def read_excel(path: Path) -> Iterator[Row]:
    """Yield the rows below the header of the first sheet, each with its number there; rows without
    any value, and columns without a name, are skipped. The whole sheet is held in memory.

    Raises:
        UserError: openpyxl is not installed, the file is no Excel workbook, or a repeated column.
    """
    header: list[str] = []
    for number, values in enumerate(_cells(path), start=1):
        if not any(value not in (None, "") for value in values):
            continue
        if header:
            named = zip(header, values, strict=True)
            yield number, {name: value for name, value in named if name}
        else:
            header = ["" if value is None else str(value).strip() for value in values]
            check_names([name for name in header if name], f"{path}, row {number}")


def _cells(path: Path) -> Iterator[tuple[Any, ...]]:
    """Return all rows of the first sheet, the header among them: pandas would rename a column whose
    name is there twice.

    Raises:
        UserError: openpyxl is not installed, or the file is no Excel workbook.
    """
    import pandas

    try:
        # Objects: a column of whole numbers with a gap must not become 1.0, nor the word NA a gap.
        sheet = pandas.read_excel(
            path, header=None, dtype=object, keep_default_na=False, engine="openpyxl"
        )
    except ImportError:
        raise UserError(
            f"{path}: Excel files need openpyxl; run pip install openpyxl, or save it as CSV"
        ) from None
    except DAMAGED as error:
        raise UserError(
            f"{path}: not a readable Excel workbook ({_reason(error)}); "
            "save it again as .xlsx, or as CSV"
        ) from None
    return sheet.itertuples(index=False, name=None)


TEXT_READERS = {".jsonl": read_jsonl, ".csv": read_csv, ".tsv": read_tsv}
READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = MappingProxyType(
    {
        **TEXT_READERS,
        ".parquet": read_parquet,
        ".xlsx": read_excel,
        **{suffix + GZIP: reader for suffix, reader in TEXT_READERS.items()},
    }
)
"""End of a file's name to reader."""


def table_suffix(path: Path) -> str:
    """Return the end of a file's name that says how it is read, in small letters: ``.csv``,
    ``.csv.gz``."""
    ends = [each.lower() for each in path.suffixes[-2:]]
    return "".join(ends if ends[-1:] == [GZIP] else ends[-1:])


def read_table(path: Path) -> Iterator[Row]:
    """Yield the rows of a file of ``READERS``.

    Raises:
        UserError: it cannot be read; see its reader.
    """
    yield from READERS[table_suffix(path)](path)
