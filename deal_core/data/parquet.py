"""Rows of a Parquet file. A value is made when it is asked for: one that is damaged, in a column
that nobody reads, harms nobody."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deal_core.data.columns import check_names
from deal_core.errors import UserError

if TYPE_CHECKING:
    from pyarrow import Array
    from pyarrow.parquet import ParquetFile


@dataclass(frozen=True, eq=False)
class ParquetRow(Mapping[str, Any]):
    """One row.

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


def read_parquet(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
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
