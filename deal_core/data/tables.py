"""Rows of JSONL, CSV and Parquet files, one at a time, each with its number."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from deal_core.errors import UserError

Row: TypeAlias = tuple[int, Mapping[str, Any]]
"""Number and values. The number is the line of the file, from 1; of a Parquet file,
which has no lines, the row, from 1."""


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
            values = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deep"
            raise UserError(
                f"{path}, row {number}: not valid JSON ({reason}); write one object per line"
            ) from None
        if not isinstance(values, dict):
            raise UserError(f"{path}, row {number}: not a JSON object; write one object per line")
        yield number, values


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
    """Yield the rows below the header of a comma-separated file; blank lines are skipped.

    The number of a row that spans several lines is its first line.

    Raises:
        UserError: unreadable file, bytes that are not UTF-8, bad quoting, a repeated
            column or a row with more or fewer fields than the header.
    """
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    header: list[str] = []
    number = 1
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"{path}, row {number}: not valid CSV ({error}); quote fields with commas, "
                'quotes or line breaks, and double the quotes inside ("")'
            ) from None
        if fields is None:
            return
        if fields and not header:
            header = _header(fields, path, number)
        elif fields:
            yield number, _values(header, fields, path, number)
        number = reader.line_num + 1


def _header(fields: list[str], path: Path, number: int) -> list[str]:
    header = [field.strip() for field in fields]
    for column in header:
        if header.count(column) > 1:
            raise UserError(f"{path}, row {number}: column '{column}' occurs twice; rename one")
    return header


def _values(header: list[str], fields: list[str], path: Path, number: int) -> dict[str, str]:
    if len(fields) != len(header):
        raise UserError(
            f"{path}, row {number}: {len(fields)} fields, but the header has {len(header)}; "
            "quote fields that hold commas"
        )
    return dict(zip(header, fields, strict=True))


def read_parquet(path: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet file; held in memory one batch at a time.

    Raises:
        UserError: unreadable or corrupt file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield number, values
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}, row {number + 1}: not a readable Parquet file ({reason}); write it again"
        ) from None


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


READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = MappingProxyType(
    {".jsonl": read_jsonl, ".csv": read_csv, ".parquet": read_parquet}
)
"""File suffix to reader."""
