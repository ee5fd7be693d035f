"""Rows of the first sheet of an Excel file."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deal_core.errors import UserError


def read_excel(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the rows below the header of the first sheet, each with its number there; rows without
    any value are skipped. The whole sheet is held in memory.

    Raises:
        UserError: openpyxl is not installed, or the file is no Excel workbook.
    """
    import pandas

    try:
        # Objects: a column of whole numbers with a gap must not become 1.0, nor the word NA a gap.
        sheet = pandas.read_excel(path, dtype=object, keep_default_na=False, engine="openpyxl")
    except ImportError:
        raise UserError(
            f"{path}: Excel files need openpyxl; run pip install openpyxl, or save it as CSV"
        ) from None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path}: not a readable Excel workbook ({reason}); save it again as .xlsx, or as CSV"
        ) from None
    columns = [str(column).strip() for column in sheet.columns]
    for number, values in enumerate(sheet.itertuples(index=False, name=None), start=2):
        if any(value not in (None, "") for value in values):
            yield number, dict(zip(columns, values, strict=True))
