"""Token ids of texts, made once: kept in memory, and on disk for the next process.

What is on disk are the texts in another form. It lies in the user's own cache folder, readable
by nobody else; ``data.cache_tokens = false`` keeps it off the disk.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from deal_core.whole_file import written_beside

Ids = list[int]
Tokenise = Callable[[list[str]], list[Ids]]

FEWEST = 256
"""Fewer texts are tokenised as fast as they are read."""


class TokenCache:
    """Texts to token ids.

    Args:
        tokenise: makes the ids.
        name: of all that they depend on beside the text; empty where that is not known: nothing
            goes to disk then.
    """

    def __init__(self, tokenise: Tokenise, name: str) -> None:
        self._tokenise, self._name = tokenise, name
        self._known: dict[str, Ids] = {}

    def prepare(self, texts: Sequence[str], folder: Path | None) -> None:
        """Make or read the ids of many texts at once.

        Args:
            texts: those that will be asked for.
            folder: of the files, made when needed; None: none are read or written.
        """
        wanted = [text for text in dict.fromkeys(texts) if text not in self._known]
        if folder is None or not self._name or len(wanted) < FEWEST:
            ids = self._tokenise(wanted) if wanted else []
        else:
            path = folder / f"{_key(self._name, wanted)}.arrow"
            stored = _read(path)
            ids = stored if stored is not None and len(stored) == len(wanted) else []
            if not ids:
                ids = self._tokenise(wanted)
                _write(path, ids)
        self._known.update(zip(wanted, ids, strict=True))

    def __call__(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of each text; what was not prepared is made now."""
        self.prepare(texts, None)
        return [self._known[text] for text in texts]


def tokeniser_name(tokenizer: Any, *settings: object) -> str:
    """Return a digest of a fast tokenizer and whatever else decides about ids; empty for others."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return ""
    return hashlib.sha256(f"{backend.to_str()} {settings}".encode()).hexdigest()


def cache_folder(name: str = "tokens") -> Path:
    """Where this user's caches lie (XDG): a folder for each kind."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "federated-deal" / name


def _key(name: str, texts: Sequence[str]) -> str:
    hashed = hashlib.sha256(name.encode())
    for text in texts:
        hashed.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    return hashed.hexdigest()[:40]


def _read(path: Path) -> list[Ids] | None:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file:
            ids: list[Ids] = pa.ipc.open_file(file).read_all()["ids"].to_pylist()
            return ids
    except (OSError, pa.ArrowInvalid, KeyError):  # not there, or damaged: made anew
        return None


def _write(path: Path, ids: list[Ids]) -> None:
    """Atomically; a cache that cannot be written is no error."""
    import pyarrow as pa

    table = pa.table({"ids": pa.array(ids, pa.list_(pa.int32()))})
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (
            written_beside(path, 0o600) as beside,
            beside.open("wb") as file,
            pa.ipc.new_file(file, table.schema) as writer,
        ):
            writer.write_table(table)
