"""The answers that a site has given: a request that comes twice gets the same one.

A run that goes on from a checkpoint asks again what it asked before. Training again would cost
time, and, with noise, release a second look at the same data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from client.alone import alone
from deal_core.atomic_write import atomic_write

if TYPE_CHECKING:
    from deal_core.privacy.interface import LocalUpdate
    from deal_core.wire.instruction import Instruction

LOCK = "updates.lock"
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
        self, request: str, instruction: Instruction, make: Callable[[], LocalUpdate]
    ) -> LocalUpdate:
        """Return the answer to ``request``: the one that is kept, or what ``make`` gives, which
        is on disk before it is returned. One at a time: of two that are asked the same at once,
        the second gets what the first has made.

        Args:
            request: a name for all that is asked (:func:`client.wire.request_name`).
            instruction: says where in the run it is asked.
            make: what it raises is not kept.
        """
        path = self.folder / f"update-{instruction.stage}-{instruction.server_round}.safetensors"
        with alone(self.folder, LOCK):
            update = _read(path, request)
            if update is None:
                update = make()
                _write(path, request, update)
                self._drop_old()
        return update

    def _drop_old(self) -> None:
        files = sorted(self.folder.glob("update-*.safetensors"), key=os.path.getmtime)
        for old in files[:-KEPT]:
            old.unlink()


def _write(path: Path, asked: str, update: LocalUpdate) -> None:
    import numpy as np
    from safetensors.numpy import save

    arrays = {key: np.ascontiguousarray(value) for key, value in update.arrays.items()}
    figures = json.dumps(dict(update.figures))
    atomic_write(path, save(arrays, {"asked": asked, "figures": figures}))


def _read(path: Path, asked: str) -> LocalUpdate | None:
    """What is kept for just this request; a file that cannot be read counts as none."""
    from safetensors import SafetensorError, safe_open

    from deal_core.privacy.interface import LocalUpdate

    try:
        with safe_open(str(path), framework="numpy") as file:
            meta = file.metadata() or {}
            if meta.get("asked") != asked:
                return None
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    return LocalUpdate(arrays, json.loads(meta["figures"]))
