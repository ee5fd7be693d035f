"""Flower's FedAvg on the arrays that a rule gets, for ``deal bench aggregation``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

WEIGHT = "num_examples"


class FedAvgRounds:
    """Flower's FedAvg on the same arrays: decoded beforehand, and from bytes."""

    def __init__(self, pool: Sequence[ArrayRecord], clients: int) -> None:
        ready = [{key: _Ready(array.numpy()) for key, array in record.items()} for record in pool]
        self._plain = [_ready_reply(k, ready[k % len(pool)]) for k in range(clients)]
        self._coded = [reply(k, pool[k % len(pool)]) for k in range(clients)]

    def seconds(self) -> tuple[float, float]:
        """One round of each."""
        return fedavg_seconds(self._plain), fedavg_seconds(self._coded)


@dataclass(frozen=True)
class _Ready:
    """What FedAvg takes for an Array, decoded beforehand."""

    array: Any

    def numpy(self) -> Any:
        return self.array


def fedavg_seconds(replies: Sequence[Any]) -> float:
    """Seconds of one aggregation: what ``FedAvg.aggregate_train`` does with the arrays."""
    started = time.perf_counter()
    aggregate_arrayrecords(list(replies), WEIGHT)
    return time.perf_counter() - started


def reply(client: int, record: ArrayRecord) -> RecordDict:
    """What FedAvg gets from a client."""
    return RecordDict({"lora": record, "metrics": MetricRecord({WEIGHT: weight(client)})})


def _ready_reply(client: int, record: dict[str, _Ready]) -> SimpleNamespace:
    return SimpleNamespace(
        array_records={"lora": record}, metric_records={"metrics": {WEIGHT: weight(client)}}
    )


def own_bytes(record: ArrayRecord) -> ArrayRecord:
    """A copy that shares no memory, as if it had arrived by itself."""
    return ArrayRecord(
        {
            key: Array(array.dtype, array.shape, array.stype, bytes(bytearray(array.data)))
            for key, array in record.items()
        }
    )


def weight(client: int) -> float:
    """Examples of a client."""
    return 100.0 + client % 7
