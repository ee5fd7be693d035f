"""Where a run's clients compute: in process, in worker processes, or under Flower's runtime. An
engine is a file and a line here; equal seeds, equal numbers."""

from __future__ import annotations

from collections.abc import Callable

from deal_core.config.experiment import Experiment
from server.folder import Listener


def _inprocess(experiment: Experiment, listener: Listener) -> None:
    from simulations.engines.inprocess import run_inprocess

    run_inprocess(experiment, listener)


def _flower(experiment: Experiment, listener: Listener) -> None:
    from simulations.engines.flower import run_flower

    run_flower(experiment, listener)


ENGINES: dict[str, Callable[[Experiment, Listener], None]] = {
    "inprocess": _inprocess,
    "flower": _flower,
}
"""``run.engine`` to what runs an experiment to its end, hands every event to the listener, and
stops all that it started, also when it is interrupted."""


def warm_up(experiment: Experiment) -> None:
    """Start, in the background and before anything is checked, what takes seconds."""
    run = experiment.run
    if run.engine == "inprocess" and run.workers != 1 and experiment.federation.clients > 1:
        from simulations.engines.worker_pool import start_forkserver

        start_forkserver()
