"""What a client keeps between requests, in its own folder, on disk.

Keyed by place in the run: a request that is repeated, after a crash or a resume, finds what it
found the first time. Requests with other settings are of another run, and find nothing: what was
made without noise must not reach an update whose noise is for less.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from deal_core.atomic_write import atomic_write

if TYPE_CHECKING:
    from deal_core.methods import Tensors

Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class FeedbackStore:
    """What a lossy wire format lost, to be made good in the next round.

    Attributes:
        folder: the site's own; made when first needed.
    """

    folder: Path

    def load(self, stage: int, server_round: int, basis: str) -> Arrays:
        """Return what the client's latest round of the stage lost; empty in its first, or when the
        basis has changed since (what was lost has no meaning in other coordinates)."""
        from safetensors import safe_open

        path = self._before(stage, server_round)
        if path is None:
            return {}
        with safe_open(str(path), framework="numpy") as file:
            if (file.metadata() or {}).get("basis") != basis:
                return {}
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def save(self, stage: int, server_round: int, basis: str, lost: Arrays) -> None:
        """Keep what this round lost, and what :meth:`load` returns: a request that is repeated
        finds it."""
        from safetensors.numpy import save

        path = self._path(stage, server_round)
        arrays = {key: np.ascontiguousarray(value) for key, value in lost.items()}
        atomic_write(path, save(arrays, {"basis": basis}))
        keep = {path, self._before(stage, server_round)}
        for old in self.folder.glob("feedback-*.safetensors"):
            if old not in keep:
                old.unlink()

    def _before(self, stage: int, server_round: int) -> Path | None:
        return _latest(server_round, partial(self._path, stage))

    def _path(self, stage: int, server_round: int) -> Path:
        return self.folder / f"feedback-{stage}-{server_round}.safetensors"


@dataclass(frozen=True)
class TaskStore:
    """What a method keeps at the client from task to task (:class:`deal_core.methods.TaskMemory`).

    Attributes:
        folder: the site's own; made when first needed.
    """

    folder: Path

    def get_or_compute(
        self, tasks: int, basis: str, make: Callable[[int, Tensors], Tensors]
    ) -> Tensors:
        """Return what is kept of so many tasks; at first made from what fewer have left. That
        stays as well, so a request that is repeated finds it."""
        path = self._path(tasks)
        kept = _read(path, basis)
        if kept is not None:
            return kept
        earlier = [n for n in range(1, tasks) if self._path(n).exists()]
        before = earlier[-1] if earlier else 0
        made = make(before, (_read(self._path(before)) or {}) if before else {})
        _write(path, made, basis)
        for old in self.folder.glob("task-*.safetensors"):
            if old not in {path, self._path(before)}:
                old.unlink()
        return made

    def _path(self, tasks: int) -> Path:
        return self.folder / f"task-{tasks}.safetensors"


@dataclass(frozen=True)
class RoundStore:
    """What a method carries from round to round (:class:`deal_core.methods.RoundState`).

    Attributes:
        folder: the site's own; made when first needed.
        stage, server_round: of the request at hand.
    """

    folder: Path
    stage: int
    server_round: int

    def load(self, basis: str) -> Tensors:
        """Return what the client's latest round of this task before this one left; empty where
        there was none, or another basis."""
        before = self._before()
        return (_read(before, basis) or {}) if before is not None else {}

    def save(self, basis: str, tensors: Tensors) -> None:
        """Keep this, and what :meth:`load` returns: a request that is repeated finds it."""
        path = self._path(self.server_round)
        _write(path, tensors, basis)
        for old in self.folder.glob("round-*.safetensors"):
            if old not in {path, self._before()}:
                old.unlink()

    def _before(self) -> Path | None:
        return _latest(self.server_round, self._path)

    def _path(self, server_round: int) -> Path:
        return self.folder / f"round-{self.stage}-{server_round}.safetensors"


def _latest(server_round: int, path_of: Callable[[int], Path]) -> Path | None:
    """The file of the client's latest round before this one, which need not be the one before."""
    # Of those that are there: a server may count as far as it likes.
    start = path_of(0).stem.removesuffix("0")
    numbers = (
        path.stem.removeprefix(start) for path in path_of(0).parent.glob(f"{start}*.safetensors")
    )
    earlier = [int(n) for n in numbers if n.isdecimal() and 0 < int(n) < server_round]
    return path_of(max(earlier)) if earlier else None


def folder_of(place: Path, run: str) -> Path:
    """Return where a site keeps what belongs to a run, of these very settings; of a simulated
    client, which protects nothing, the name of the run is empty."""
    return place / f"kept-{hashlib.sha256(run.encode()).hexdigest()[:32]}"


def forget(folder: Path) -> None:
    """Drop what earlier runs kept, in this folder and beside it; called after the first round of
    this one, whose own files stay."""
    for other in folder.parent.glob("kept-*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    for kind in ("task", "round", "feedback"):
        for old in folder.glob(f"{kind}-*.safetensors"):
            if old.stem != f"{kind}-0-1":
                old.unlink()


def _write(path: Path, tensors: Tensors, basis: str) -> None:
    """Make the folder; a kill leaves the old file or the new one."""
    from safetensors.torch import save

    atomic_write(path, save(tensors, {"basis": basis}))


def _read(path: Path, basis: str | None = None) -> Tensors | None:
    """The tensors of a file; None where there is none, or one with another basis than asked for."""
    from safetensors import safe_open

    if not path.exists():
        return None
    with safe_open(str(path), framework="pt") as file:
        if basis is not None and (file.metadata() or {}).get("basis") != basis:
            return None
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def digest(arrays: Mapping[str, NDArray[np.float32]]) -> str:
    """A name for these values; equal values have equal names."""
    hashed = hashlib.sha256()
    for key in sorted(arrays):
        hashed.update(key.encode())
        hashed.update(np.ascontiguousarray(arrays[key]).tobytes())
    return hashed.hexdigest()
