"""The process that workers are forked from: it imports once what all of them need."""

from __future__ import annotations

from multiprocessing import context, forkserver, get_context

from simulations.engines.interrupt import ignoring_ctrl_c

PRELOADED = [
    "client.app",
    "client.local_evaluation",
    "client.local_update",
    "client.wire",
    "client.resources",
    "flwr_datasets",
]


def start() -> context.ForkServerContext:
    """Start it, unless it runs; it imports in the background, and ends with this process.

    A terminal sends Ctrl-C to all processes; it and its workers leave that to this one.

    Returns:
        The context whose processes are forked from it.
    """
    processes = get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED)
    with ignoring_ctrl_c():  # a new process inherits it
        forkserver.ensure_running()
    return processes
