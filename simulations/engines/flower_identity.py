"""Flower lets only its own processes create messages; this process says who it is.

Uses an internal of Flower 1.42, here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flwr.supercore.task_identity import TaskIdentity


@contextmanager
def assume_identity(run_id: int, node_id: int) -> Iterator[None]:
    """Within the block, messages can be created as ``node_id`` of ``run_id``."""
    before = (TaskIdentity._run_id, TaskIdentity._task_id, TaskIdentity._node_id)
    become(run_id, node_id)
    try:
        yield
    finally:
        TaskIdentity._run_id, TaskIdentity._task_id, TaskIdentity._node_id = before


def become(run_id: int, node_id: int) -> None:
    """From now on, messages can be created as ``node_id`` of ``run_id``."""
    TaskIdentity.run_id = run_id
    TaskIdentity.task_id = run_id
    TaskIdentity.node_id = node_id
