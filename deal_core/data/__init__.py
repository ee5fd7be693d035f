"""Sources of tasks, and the division of a task among clients; no adapter, no training."""

from __future__ import annotations

from deal_core.data.partition import PARTITIONERS, partition
from deal_core.data.source import DataSource, Example, TaskData, declared_labels
from deal_core.data.sources import (
    SOURCES,
    client_names,
    load_for_clients,
    open_source,
    public_labels,
)

__all__ = [
    "PARTITIONERS",
    "SOURCES",
    "DataSource",
    "Example",
    "TaskData",
    "client_names",
    "declared_labels",
    "load_for_clients",
    "open_source",
    "partition",
    "public_labels",
]
