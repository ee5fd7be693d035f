"""Unlabelled texts that every client has: a file that is no client's own."""

from __future__ import annotations

from pathlib import Path

from deal_core.config.data import DataConfig
from deal_core.config.home import at_home
from deal_core.data.rows import Columns, to_text
from deal_core.data.tables import READERS, read_lines, read_table, table_suffix
from deal_core.errors import UserError

KEY = "method.consolidation.public_path"


def read_public(name: str, config: DataConfig) -> list[str]:
    """Return the texts of a file in its order, each once.

    Args:
        name: a JSONL, CSV or Parquet file, whose texts stand in ``data.text_column`` (and
            ``data.pair_column``); any other is plain text, one text a line.
        config: names the columns.

    Raises:
        UserError: no such file, no text in it, or a row that cannot be read.
    """
    path = at_home(name)
    if not path.is_file():
        raise UserError(f"{KEY}: {path}: no such file; every client needs it at this path")
    texts = list(dict.fromkeys(_texts(path, config)))
    if not texts:
        raise UserError(f"{path}: holds no texts; add some or choose another {KEY}")
    return texts


def _texts(path: Path, config: DataConfig) -> list[str]:
    if table_suffix(path) not in READERS:
        return [text for _, text in read_lines(path)]
    columns, texts = Columns.of(config, ""), []
    for number, row in read_table(path):
        try:
            texts.append(to_text(row, columns))
        except UserError as error:
            raise UserError(f"{path}, row {number}: {error}") from None
    return texts
