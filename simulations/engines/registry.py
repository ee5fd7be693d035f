"""Where an experiment runs. An engine is a file and a line here; equal seeds, equal numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from deal_core.config.experiment import Experiment
from server.folder import Listener


@dataclass(frozen=True)
class Engine:
    """One way to run an experiment.

    Attributes:
        run: to its end, handing every event to the listener; stops all it started, also when
            it is interrupted.
        warm_up: starts, in the background and before anything is checked, what takes seconds.
    """

    run: Callable[[Experiment, Listener], None]
    warm_up: Callable[[Experiment], None] = lambda experiment: None


def _inprocess(experiment: Experiment, listener: Listener) -> None:
    from simulations.engines.inprocess import run_inprocess

    run_inprocess(experiment, listener)


def _start_forkserver(experiment: Experiment) -> None:
    from simulations.engines.worker_pool import start_forkserver

    if experiment.run.workers != 1 and experiment.federation.clients > 1:
        start_forkserver()


def _flower(experiment: Experiment, listener: Listener) -> None:
    from simulations.engines.flower import run_flower

    run_flower(experiment, listener)


ENGINES: dict[str, Engine] = {
    "inprocess": Engine(_inprocess, _start_forkserver),
    "flower": Engine(_flower),
}
"""``run.engine`` to engine."""
