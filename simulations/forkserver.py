"""The process that workers are forked from: it imports once what all of them need."""

from __future__ import annotations

from multiprocessing import context, forkserver, get_context

PRELOADED = ["client.app", "client.work", "client.wire", "client.workbench", "flwr_datasets"]


def start() -> context.ForkServerContext:
    """Start it, unless it runs; it imports in the background, and ends with this process."""
    processes = get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()
    return processes
