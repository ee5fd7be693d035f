"""Rows of JSONL, CSV, Parquet and Excel files, one at a time, each with its number."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, TypeAlias

from deal_core.data.columns import check_names
from deal_core.data.excel import read_excel
from deal_core.data.parquet import read_parquet
from deal_core.errors import UserError

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
