"""The retained adapter as the server last sent it: it changes once a stage, and is sent once.

A client that lacks it, because its folder is gone or was damaged, says so and is sent it again.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Array, ArrayRecord

from deal_core.atomic_write import atomic_write
from deal_core.wire.records import record_digest

NAME = "distilled.safetensors"


class DistilledMissing(Exception):
    """The request names a retained adapter that this client does not have."""


@dataclass(frozen=True)
class DistilledStore:
    """One record, named by its digest. Attributes: ``folder``, of the client, for this run."""

    folder: Path

    def load(self, digest: str) -> ArrayRecord:
        """Return the record of that name.

        Raises:
            DistilledMissing: there is none, or it was damaged.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.folder / NAME), framework="numpy") as file:
                headers = json.loads((file.metadata() or {})["headers"])
                arrays = {
                    key: Array(dtype, tuple(shape), stype, file.get_tensor(key).tobytes())
                    for key, (dtype, shape, stype) in headers.items()
                }
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError):
            raise DistilledMissing("no retained adapter is kept here") from None
        record = ArrayRecord(arrays)
        if record_digest(record) != digest:
            raise DistilledMissing("another retained adapter is kept here")
        return record

    def save(self, record: ArrayRecord) -> None:
        """Keep a record in the place of the one before. A disk that is full costs the bytes of
        another message, and no answer."""
        import numpy as np
        from safetensors.numpy import save

        headers = {key: (a.dtype, list(a.shape), a.stype) for key, a in record.items()}
        raw = {key: np.frombuffer(a.data, np.uint8) for key, a in record.items()}
        with suppress(OSError):
            atomic_write(self.folder / NAME, save(raw, {"headers": json.dumps(headers)}))
