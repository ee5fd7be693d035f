"""What a client keeps between requests, in its own folder, on disk.

Keyed by task and round: a request that is repeated, after a crash or a resume, finds what it
found the first time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class FeedbackStore:
    """What a lossy wire format lost, to be made good in the next round.

    Attributes:
        folder: the site's own; made when first needed.
    """

    folder: Path

    def load(self, task_index: int, server_round: int, basis: str) -> Arrays:
        """Return what the round before lost; empty in the first round of a task, or when the
        basis has changed since (what was lost has no meaning in other coordinates)."""
        from safetensors import safe_open

        path = self._path(task_index, server_round - 1)
        if not path.exists():
            return {}
        with safe_open(str(path), framework="numpy") as file:
            if (file.metadata() or {}).get("basis") != basis:
                return {}
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def save(self, task_index: int, server_round: int, basis: str, lost: Arrays) -> None:
        """Keep what this round lost; the rounds before the last are dropped."""
        from safetensors.numpy import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(task_index, server_round)
        beside = path.with_suffix(".writing")
        arrays = {key: np.ascontiguousarray(value) for key, value in lost.items()}
        save_file(arrays, beside, {"basis": basis})
        beside.replace(path)
        keep = {path, self._path(task_index, server_round - 1)}
        for old in self.folder.glob("feedback-*.safetensors"):
            if old not in keep:
                old.unlink()

    def _path(self, task_index: int, server_round: int) -> Path:
        return self.folder / f"feedback-{task_index}-{server_round}.safetensors"


def digest(arrays: Mapping[str, NDArray[np.float32]]) -> str:
    """A name for these values; equal values have equal names."""
    hashed = hashlib.sha256()
    for key in sorted(arrays):
        hashed.update(key.encode())
        hashed.update(np.ascontiguousarray(arrays[key]).tobytes())
    return hashed.hexdigest()
