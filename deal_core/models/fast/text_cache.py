"""What is made of a text once, kept in memory and on disk for the next process: token ids, and the
vectors of an encoder of which nothing learns. The plain path makes them at every use.

What is on disk are the texts in another form, or numbers from which a text can be guessed. It lies
in the user's own cache folder, readable by nobody else; ``data.cache_tokens = false`` keeps it off
the disk.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deal_core.atomic_write import atomic_path, atomic_write

TokenIds = list[int]
Tokenise = Callable[[list[str]], list[TokenIds]]

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
        self._known: dict[str, TokenIds] = {}

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
            path = folder / f"{_name_of(self._name, wanted)}.arrow"
            stored = _read_ids(path)
            ids = stored if stored is not None and len(stored) == len(wanted) else []
            if not ids:
                ids = self._tokenise(wanted)
                _write_ids(path, ids)
        self._known.update(zip(wanted, ids, strict=True))

    def __call__(self, texts: Sequence[str]) -> list[TokenIds]:
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


def _name_of(name: str, texts: Sequence[str]) -> str:
    hashed = hashlib.sha256(name.encode())
    for text in texts:
        hashed.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    return hashed.hexdigest()[:40]


def _read_ids(path: Path) -> list[TokenIds] | None:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file:
            ids: list[TokenIds] = pa.ipc.open_file(file).read_all()["ids"].to_pylist()
            return ids
    except (OSError, pa.ArrowInvalid, KeyError):  # not there, or damaged: made anew
        return None


def _write_ids(path: Path, ids: list[TokenIds]) -> None:
    """Atomically; a cache that cannot be written is no error."""
    import pyarrow as pa

    table = pa.table({"ids": pa.array(ids, pa.list_(pa.int32()))})
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (
            atomic_path(path, 0o600) as beside,
            beside.open("wb") as file,
            pa.ipc.new_file(file, table.schema) as writer,
        ):
            writer.write_table(table)


Ids = tuple[int, ...]
Embed = Callable[[Sequence[Ids]], Tensor]

MOST = 200_000
"""Texts that are kept in memory: 300 MB of vectors with 384 entries."""


class FrozenVectors:
    """Token ids of texts to vectors.

    Args:
        embed: makes ``(texts, size)``, float32; its gradients are not wanted.
        name: of all that a vector depends on beside the text; asked for where a file is.
    """

    def __init__(self, embed: Embed, name: Callable[[], str]) -> None:
        self._embed, self._name = embed, cache(name)
        self._known: dict[Ids, Tensor] = {}

    def prepare(self, texts: Sequence[Ids], folder: Path | None) -> None:
        """Make or read the vectors of many texts at once.

        Args:
            texts: token ids of those that will be asked for.
            folder: of the files, made when needed; None: none are read or written.
        """
        if len(self._known) + len(texts) > MOST:
            self._known.clear()
        wanted = [ids for ids in dict.fromkeys(texts) if ids not in self._known]
        if not wanted:
            return
        path = None if folder is None else folder / f"{self._key(wanted)}.npy"
        vectors = _read_vectors(path, len(wanted)) if path is not None else None
        if vectors is None:
            vectors = self._made(wanted)
            if path is not None:
                _write_vectors(path, vectors)
        self._known.update(zip(wanted, vectors, strict=True))

    def __call__(self, texts: Sequence[Ids]) -> Tensor:
        """Return the vectors, ``(texts, size)``; what was not prepared is made now."""
        self.prepare(texts, None)
        return torch.stack([self._known[ids] for ids in texts])

    def _made(self, texts: Sequence[Ids]) -> Tensor:
        """Return the vectors in the order of the texts, each made in a pass of its own: beside
        others it would be rounded otherwise, and tell of them."""
        with torch.no_grad():
            return torch.cat([self._embed([ids]) for ids in texts])

    def _key(self, texts: Sequence[Ids]) -> str:
        hashed = hashlib.sha256(f"alone {self._name()}".encode())
        for ids in texts:
            hashed.update(hashlib.sha256(np.asarray(ids, np.int64).tobytes()).digest())
        return hashed.hexdigest()[:40]


def weights_name(weights: Mapping[str, Tensor], *settings: object) -> str:
    """Return a digest of named weights, and of whatever else decides about vectors."""
    hashed = hashlib.sha256(repr(settings).encode())
    for name, weight in weights.items():
        data = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
        hashed.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        hashed.update(data.tobytes())
    return hashed.hexdigest()


def _read_vectors(path: Path, texts: int) -> Tensor | None:
    try:
        vectors = np.load(path, allow_pickle=False)
    except (OSError, ValueError):  # not there, or damaged: made anew
        return None
    right = vectors.ndim == 2 and len(vectors) == texts and vectors.dtype == np.float32
    return torch.from_numpy(vectors) if right else None


def _write_vectors(path: Path, vectors: Tensor) -> None:
    """Atomically; a cache that cannot be written is no error."""
    buffer = BytesIO()
    np.save(buffer, vectors.float().cpu().numpy(), allow_pickle=False)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        atomic_write(path, buffer.getvalue(), 0o600)
