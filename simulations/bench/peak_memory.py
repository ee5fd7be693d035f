"""Peak memory of a command with everything it starts."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import psutil

from simulations.bench.measure import peak_resident

MARK = "DEAL_BENCH"
"""In the environment of all that belongs together: Ray's processes leave their parents."""
SAMPLE_SECONDS, LOOK_SECONDS = 0.5, 0.02


def run_watched(command: Sequence[str], log: Path) -> int:
    """Run to the end, and watch the memory.

    Shared pages count once: each process counts its proportional part of them. At least what
    the command's own process had at its largest.

    Returns:
        The largest memory of all its processes together that was seen, in bytes.

    Raises:
        RuntimeError: the command failed; the message has the end of its log.
    """
    name = uuid4().hex
    ended = threading.Event()
    peaks = [0]

    def watch() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            peaks.append(marked_bytes(name))

    watcher = threading.Thread(target=watch)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, MARK: name}
        )
        watcher.start()
        try:
            while (code := process.poll()) is None:
                peaks.append(peak_resident(process.pid) or 0)  # cheap: also what is soon over
                time.sleep(LOOK_SECONDS)
        finally:
            ended.set()
            watcher.join()
    if code:
        end = log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(command)}: exit code {code}\n{end}")
    return max(peaks)


def marked_bytes(name: str) -> int:
    """Memory of all processes that carry the mark."""
    total = 0
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == name:
                total += process.memory_full_info().pss
    return total
