"""Rows of the first sheet of an Excel file."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deal_core.data.columns import check_names
from deal_core.errors import UserError

DAMAGED = (
    *(OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError),
    *(SyntaxError, ValueError, TypeError, LookupError),
)
"""Raised while a workbook is read: by what unpacks it; and by the readers of its XML, where that is
cut off (``ParseError`` is a ``SyntaxError``), or names and numbers in it are wrong."""


def read_excel(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
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
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path}: not a readable Excel workbook ({reason}); save it again as .xlsx, or as CSV"
        ) from None
    return sheet.itertuples(index=False, name=None)
