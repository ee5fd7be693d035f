"""What an encoder of which nothing learns makes of texts: made once, in memory and on disk.

On disk are numbers from which a text can be guessed; they lie where its token ids do, under the
same key of the experiment (``data.cache_tokens``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deal_core.whole_file import write_whole

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
        vectors = _read(path, len(wanted)) if path is not None else None
        if vectors is None:
            vectors = self._made(wanted)
            if path is not None:
                _write(path, vectors)
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


def _read(path: Path, texts: int) -> Tensor | None:
    try:
        vectors = np.load(path, allow_pickle=False)
    except (OSError, ValueError):  # not there, or damaged: made anew
        return None
    right = vectors.ndim == 2 and len(vectors) == texts and vectors.dtype == np.float32
    return torch.from_numpy(vectors) if right else None


def _write(path: Path, vectors: Tensor) -> None:
    """Atomically; a cache that cannot be written is no error."""
    buffer = BytesIO()
    np.save(buffer, vectors.float().cpu().numpy(), allow_pickle=False)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(path, buffer.getvalue(), 0o600)
