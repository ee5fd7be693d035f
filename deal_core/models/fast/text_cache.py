"""What is made of a text once, kept in memory and on disk for the next process: token ids, and the
vectors of an encoder of which nothing learns. The plain path makes them at every use.

What is on disk are the texts in another form, or numbers from which a text can be guessed. It lies
in the user's own cache folder, readable by nobody else; texts of a real site are kept in memory
alone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from deal_core.atomic_write import atomic_write

Arrays = dict[str, np.ndarray]
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
        path = None
        if folder is not None and self._name and len(wanted) >= FEWEST:
            read = (text.encode("utf-8", "surrogatepass") for text in wanted)
            path = folder / f"{_name_of(self._name, read)}.npz"

        def make() -> Arrays:
            ids = self._tokenise(wanted) if wanted else []
            flat = np.fromiter((token for own in ids for token in own), np.int32)
            return {"ids": flat, "lengths": np.array([len(own) for own in ids], np.int64)}

        found = stored(path, make)
        ends = np.cumsum(found["lengths"])[:-1]
        rows = np.split(found["ids"], ends) if wanted else []
        self._known.update(zip(wanted, (row.tolist() for row in rows), strict=True))

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


def stored(path: Path | None, make: Callable[[], Arrays]) -> Arrays:
    """Return named arrays, from a file where an earlier process has left them; otherwise they are
    made, and left there for the next. A file that is damaged, or cannot be written, costs time
    alone.

    Args:
        path: its name says all that the arrays depend on; None: nothing is read or written.
        make: makes them.
    """
    if path is None:
        return make()
    with (
        suppress(OSError, ValueError, EOFError, BadZipFile),
        np.load(path, allow_pickle=False) as file,
    ):
        return dict(file)
    made, buffer = make(), BytesIO()
    np.savez(buffer, allow_pickle=False, **made)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        atomic_write(path, buffer.getvalue(), 0o600)
    return made


def _name_of(name: str, parts: Iterable[bytes]) -> str:
    hashed = hashlib.sha256(name.encode())
    for part in parts:
        hashed.update(hashlib.sha256(part).digest())
    return hashed.hexdigest()[:40]


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
        path = None
        if folder is not None:
            read = (np.asarray(ids, np.int64).tobytes() for ids in wanted)
            path = folder / f"{_name_of(f'alone {self._name()}', read)}.npz"
        found = stored(path, lambda: {"vectors": self._made(wanted).float().cpu().numpy()})
        vectors = torch.from_numpy(found["vectors"])
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


def weights_name(weights: Mapping[str, Tensor], *settings: object) -> str:
    """Return a digest of named weights, and of whatever else decides about vectors."""
    hashed = hashlib.sha256(repr(settings).encode())
    for name, weight in weights.items():
        data = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
        hashed.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        hashed.update(data.tobytes())
    return hashed.hexdigest()
