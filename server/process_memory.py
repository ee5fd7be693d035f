"""Memory of this process and of the workers that it has started."""

from __future__ import annotations

import resource
from contextlib import suppress

import psutil


def peak_rss_bytes() -> int:
    """Return the largest resident memory of this process so far, and what the workers it has
    started hold now: their part of what processes share, where the system tells it."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    workers = 0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            held = process.memory_full_info()
            workers += getattr(held, "pss", held.rss)
    return own + workers
