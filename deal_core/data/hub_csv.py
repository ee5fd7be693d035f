"""CSV files of a data set, read as what is written there.

pandas, which reads them for the library, guesses: a code ``01`` becomes the number 1, a text ``NA``
nothing, and where all rows have a field more than the header the first one becomes the name of the
row, and is lost.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from deal_core.data.rows import Columns

if TYPE_CHECKING:
    from datasets import DatasetBuilder


ROWS = 10**8
"""Read at once: in a part of a file a column of numbers may have no gap, and be of another type."""


def csv_options(builder: DatasetBuilder, columns: Columns) -> dict[str, Any]:
    """Return options under which no column is guessed; none for files of other kinds. Where the
    data set says what its columns are, that stands."""
    from datasets.packaged_modules.csv.csv import CsvConfig

    if not isinstance(builder.config, CsvConfig):
        return {}
    if builder.config.features is not None or builder.info.features is not None:
        return {"index_col": False}
    names = [name for name in vars(columns).values() if name]
    as_written = {"converters": dict.fromkeys(names, str), "na_filter": False}
    return {"index_col": False, **as_written, "chunksize": ROWS}


@contextmanager
def csv_complaints_raised() -> Iterator[None]:
    """Within the block a row that has more fields than the header is an error; pandas would warn,
    and leave some out.

    Raises:
        ValueError: there is such a row.
        DatasetsError: whatever else is wrong with the files.
    """
    from datasets.exceptions import DatasetsError
    from pandas.errors import ParserWarning

    with warnings.catch_warnings():
        warnings.simplefilter("error", ParserWarning)
        try:
            yield
        except DatasetsError as error:
            if not isinstance(error.__cause__, ParserWarning):
                raise
            raise ValueError(
                "a row has more fields than the header: quote fields that hold commas"
            ) from None
