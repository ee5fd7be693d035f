"""Clients that misbehave on purpose, to see what the federation withstands (simulation only)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, Message
from numpy.typing import NDArray

from deal_core.config import FaultsConfig
from deal_core.errors import choose
from deal_core.payload import LORA

Spoil = Callable[[NDArray[np.float32]], NDArray[np.float32]]

FAULTS: Mapping[str, Spoil] = {
    "none": lambda values: values,
    "scaled": lambda values: values * np.float32(10),
    "sign-flipped": lambda values: -values,
    "nan": lambda values: np.full_like(values, np.nan),
}
"""``faults.kind`` to what it does to every float32 array of an update."""


def spoiler(faults: FaultsConfig, first_client_node: int) -> Callable[[Message], Message]:
    """Return what spoils the updates of ``faults.clients`` on their way to the server.

    Raises:
        UserError: unknown kind.
    """
    spoil = choose("faults.kind", faults.kind, FAULTS)
    nodes = {first_client_node + client for client in faults.clients}

    def pass_on(reply: Message) -> Message:
        if reply.metadata.src_node_id in nodes and LORA in reply.content:
            reply.content[LORA] = ArrayRecord(
                {
                    key: Array(spoil(array.numpy())) if array.dtype == "float32" else array
                    for key, array in reply.content.array_records[LORA].items()
                }
            )
        return reply

    return pass_on
