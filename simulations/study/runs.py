"""The runs of a study: which are left, and a process for each, several at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from server.folder import RunFolder
from server.results import read_results
from simulations.engines import deferred, uninterrupted
from simulations.engines.worker_pool import gpus_here, shown_gpu
from simulations.run.simulate import RECORD, check_same, claimed, recorded
from simulations.study.grid import precise

LOG = "log.txt"
"""What the process of a run said, in the run's folder."""
POLL_SECONDS = 0.2
PATIENCE_SECONDS = 30.0
"""For a process that was asked to stop."""

Standing = Literal["new", "started", "finished"]


def run_status(experiment: Experiment) -> Standing:
    """Return how far a run in its folder has come. UserError: it has other settings."""
    folder = RunFolder(Path(experiment.run.out))
    cure = "set it back, remove that folder, or choose another --out"
    if folder.results.exists():
        check_same(experiment, read_results(folder.path).config, "study", cure)
        return "finished"
    if folder.can_resume:
        check_same(experiment, recorded(folder.path), "study", cure)
        return "started"
    return "new"


def run_all(
    runs: Mapping[str, Experiment],
    jobs: int,
    on_start: Callable[[str], None],
    on_end: Callable[[str, str], None],
) -> None:
    """Run experiments, in their order, ``jobs`` at a time; one that fails stops no other.

    Interrupted, it stops what is at work (each leaves its checkpoint) before it returns. Of
    several GPUs each of the runs side by side has one.

    Args:
        runs: name to complete experiment; none of them finished.
        jobs: processes at a time, at least 1.
        on_start: told the name of a run that has begun.
        on_end: told the name of one that has ended, and why it failed (empty: it has not).
    """
    waiting, places = deque(runs), dict[str, int]()
    working: dict[str, subprocess.Popen[bytes]] = {}
    gpus = gpus_here()
    try:
        while waiting or working:
            while waiting and len(working) < jobs:
                name = waiting.popleft()
                on_start(name)
                try:
                    places[name] = min(set(range(jobs)) - {places[each] for each in working})
                    with deferred():
                        working[name] = start(runs[name], shown_gpu(places[name], gpus))
                except UserError as error:
                    on_end(name, str(error))
            ended = [name for name, process in working.items() if process.poll() is not None]
            for name in ended:
                code = working.pop(name).returncode
                on_end(name, "" if code == 0 else reason(Path(runs[name].run.out), code))
            if not ended:
                time.sleep(POLL_SECONDS)
    finally:
        with uninterrupted():
            stop(list(working.values()))


def start(experiment: Experiment, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Return ``deal simulate`` on the experiment, started: this very code, in a process of its own
    that Ctrl-C at the terminal does not reach; a run that was stopped continues."""
    folder = Path(experiment.run.out)
    resume = run_status(experiment) == "started"
    run = experiment.run.model_copy(update={"resume": resume})
    wanted = experiment if resume else precise(experiment)
    with claimed(wanted.model_copy(update={"run": run})):
        pass  # written where no other process is at work; the run claims it for itself
    command = [sys.executable, "-P", "-m", "simulations.cli", "simulate", str(folder / RECORD)]
    command += ["--out", str(folder), *(["--resume"] if resume else [])]
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,
        )


def reason(folder: Path, code: int) -> str:
    """Return why a run failed, on one line: its last words, and where the rest is."""
    log = folder / LOG
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    said = lines[-1].strip().removeprefix("error: ") if lines else "it said nothing"
    killed = f"killed by signal {-code}; " if code < 0 else ""
    return f"{killed}{said} (see {log})"


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask processes to stop, and end those that do not."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + PATIENCE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
