"""Public texts: of a file that every client has and is no client's own, or what is embedded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from deal_core.config.data import DataConfig
from deal_core.data.embedded import asset_folder
from deal_core.data.rows import Columns, to_text
from deal_core.data.tables import READERS, read_lines, read_table
from deal_core.data.written import by_hash
from deal_core.errors import UserError, at_home

KEY = "data.public_path"


def public_texts(config: DataConfig, labels: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return public texts: of the file ``data.public_path``; else embedded ones, none of which is a
    text of an embedded task; where these are not installed, the names of all ``labels``.

    Raises:
        UserError: as :func:`read_public`.
    """
    if config.public_path:
        return tuple(read_public(config.public_path, config))
    try:
        return embedded_texts(asset_folder("public"))
    except UserError:
        return tuple(dict.fromkeys(name for names in labels for name in names))


def read_public(name: str, config: DataConfig) -> list[str]:
    """Return the texts of a file in its order, each once: of a table those in ``data.text_column``
    (and ``data.pair_column``), of any other file one a line.

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
    if path.suffix.lower() not in READERS:
        return [text for _, text in read_lines(path)]
    columns, texts = Columns.of(config, ""), []
    for number, row in read_table(path):
        try:
            texts.append(to_text(row, columns))
        except UserError as error:
            raise UserError(f"{path}, row {number}: {error}") from None
    return texts


@lru_cache(maxsize=1)
def embedded_texts(folder: Path) -> tuple[str, ...]:
    """Return embedded public texts, the same on every machine: questions of medical exams, of
    patients, on papers' abstracts, and of all kinds."""
    wanted = {
        ("MMLU/clinical.jsonl", "question", "options"): 450,
        ("healthsearchqa/test.jsonl", "question", ""): 250,
        ("PubMedQA/pqaa/test.jsonl", "question", ""): 250,
        ("BoolQ/combined.jsonl", "question", ""): 250,
        ("CommonsenseQA/validation.jsonl", "question", ""): 150,
        ("SIQA/test.jsonl", "passage", "question"): 150,
    }
    texts: list[str] = []
    for (name, first, second), number in wanted.items():
        rows = map(json.loads, (folder / name).read_text(encoding="utf-8").splitlines())
        found = {" ".join(f"{row[first]} {row.get(second, '')}".split()) for row in rows}
        texts += sorted(found, key=by_hash)[:number]
    return tuple(texts)


@lru_cache(maxsize=4)
def texts_digest(texts: tuple[str, ...]) -> str:
    """Return a digest of public texts, hexadecimal: sites of a sum must have the same."""
    hashed = hashlib.sha256()
    for text in texts:
        hashed.update(hashlib.sha256(text.encode()).digest())
    return hashed.hexdigest()
