"""The answers that a site has given: a request that comes twice gets the same one.

A run that goes on from a checkpoint asks again what it asked before. Training again would cost
time, and, with noise, release a second look at the same data.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, RecordDict

if TYPE_CHECKING:
    from client.work import Update
    from deal_core.instruction import Instruction

FIGURES = ("num_examples", "loss", "seconds")
KEPT = 2
"""Rounds: a checkpoint is never more than one behind."""


@dataclass(frozen=True)
class UpdateStore:
    """Updates by stage and round.

    Attributes:
        folder: the site's own, of one run; made when first needed.
    """

    folder: Path

    def once(
        self, request: RecordDict, instruction: Instruction, make: Callable[[], Update | None]
    ) -> Update | None:
        """Return the answer to ``request``: the one that is kept, or what ``make`` gives, which
        is on disk before it is returned. None (there is no data) is not kept."""
        asked = digest(request)
        path = self.folder / f"update-{instruction.stage}-{instruction.server_round}.safetensors"
        update = _read(path, asked)
        if update is None:
            update = make()
            if update is not None:
                _write(path, asked, update)
                self._drop_old()
        return update

    def _drop_old(self) -> None:
        files = sorted(self.folder.glob("update-*.safetensors"), key=os.path.getmtime)
        for old in files[:-KEPT]:
            old.unlink()


def digest(request: RecordDict) -> str:
    """A name for the content of a request; equal to the byte, equal in name."""
    hashed = hashlib.sha256()
    for name in sorted(request):
        record = request[name]
        hashed.update(name.encode())
        if isinstance(record, ArrayRecord):
            for key in sorted(record):
                array = record[key]
                head = json.dumps([key, array.dtype, list(array.shape), array.stype])
                hashed.update(head.encode() + array.data)
        else:
            hashed.update(json.dumps(dict(record), sort_keys=True, default=str).encode())
    return hashed.hexdigest()


def _write(path: Path, asked: str, update: Update) -> None:
    import numpy as np
    from safetensors.numpy import save

    path.parent.mkdir(parents=True, exist_ok=True)
    figures = {key: json.dumps(getattr(update, key)) for key in FIGURES}
    arrays = {key: np.ascontiguousarray(value) for key, value in update.encoded.items()}
    beside = path.with_suffix(".writing")
    with beside.open("wb") as file:
        file.write(save(arrays, {"asked": asked, **figures}))
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _read(path: Path, asked: str) -> Update | None:
    """What is kept for just this request; a file that cannot be read counts as none."""
    from safetensors import SafetensorError, safe_open

    from client.work import Update

    try:
        with safe_open(str(path), framework="numpy") as file:
            meta = file.metadata() or {}
            if meta.get("asked") != asked:
                return None
            encoded = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    return Update(encoded, **{key: json.loads(meta[key]) for key in FIGURES})
