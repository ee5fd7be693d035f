"""Where an experiment runs. An engine is a file and a line here; equal seeds, equal numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from deal_core.config import Experiment
from server.events import Listener

Engine: TypeAlias = Callable[[Experiment, Listener], None]
"""Runs an experiment to its end and hands every event to the listener.

An engine stops all it started, also when it is interrupted.
"""


def _inprocess(experiment: Experiment, listener: Listener) -> None:
    from simulations.inprocess import run_inprocess

    run_inprocess(experiment, listener)


def _flower(experiment: Experiment, listener: Listener) -> None:
    from simulations.flower_engine import run_flower

    run_flower(experiment, listener)


ENGINES: dict[str, Engine] = {"inprocess": _inprocess, "flower": _flower}
"""``run.engine`` to engine."""
