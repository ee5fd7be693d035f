"""Clients that misbehave on purpose, to see what the federation withstands (simulation only)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from flwr.app import Array, Message
from numpy.typing import NDArray

from deal_core.config.experiment import FaultsConfig
from deal_core.errors import choose
from deal_core.lora.payload import LORA

Spoil = Callable[[NDArray[np.float32]], NDArray[np.float32]]

FAULTS: Mapping[str, Spoil] = {
    "none": lambda values: values,
    "scaled": lambda values: values * np.float32(10),
    "sign-flipped": lambda values: -values,
    "not-finite": lambda values: np.full_like(values, np.nan),
}
"""``faults.kind`` to what it does to the float32 arrays of an update."""


def touched(kind: str, keys: Sequence[str]) -> list[str]:
    """Return the arrays a fault acts on: all of them, except that a sign is flipped on one factor
    alone (flipped on both, the product would be the good one again)."""
    factor = [key for key in keys if "lora_B" in key]
    return factor if kind == "sign-flipped" and factor else list(keys)


def spoiler(faults: FaultsConfig, first_client_node: int) -> Callable[[Message], Message]:
    """Return what spoils the updates of ``faults.clients`` on their way to the server.

    Raises:
        UserError: unknown kind.
    """
    spoil = choose("faults.kind", faults.kind, FAULTS)
    nodes = {first_client_node + client for client in faults.clients}

    def pass_on(reply: Message) -> Message:
        records = reply.content.array_records if reply.has_content() else {}
        for name in {LORA} & records.keys() if reply.metadata.src_node_id in nodes else ():
            record = records[name]
            for key in touched(faults.kind, list(record)):
                if record[key].dtype in ("float32", "float64"):
                    record[key] = Array(spoil(record[key].numpy()))
        return reply

    return pass_on
