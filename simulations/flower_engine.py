"""Engine ``flower``: ``flwr run`` on Flower's simulation runtime, for many cores or GPUs.

What the apps write to ``metrics.jsonl`` is followed for the listener. Whether the run succeeded
is asked of the SuperLink: ``flwr run`` exits with 0 also when the run has failed.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from deal_core.config import Experiment, flatten
from deal_core.errors import UserError
from server.events import Event, Listener
from server.folder import RunFolder
from simulations.flower_sandbox import CONNECTION, Sandbox, flower_sandbox, program
from simulations.toml_text import toml_lines

LOG = "flower.log"
"""Flower's own output, in the run folder."""
POLL_SECONDS = 0.2


class RunFailed(UserError):
    """The run ended without results; the message has the reason and the place of the log."""


@dataclass
class Tail:
    """Follows a file of JSON lines from where it ends now."""

    path: Path
    offset: int = 0

    @classmethod
    def from_end(cls, path: Path) -> Tail:
        """Skip what is there: a resumed run appends."""
        return cls(path, path.stat().st_size if path.exists() else 0)

    def new(self) -> Iterator[Event]:
        """Yield the complete lines since the last call."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self.offset += len(line)
                yield json.loads(line)


def run_flower(experiment: Experiment, listener: Listener) -> None:
    """Run the experiment; nothing that was started outlives the call.

    Raises:
        RunFailed: the run did not reach its end.
        UserError: no checkout to run from, or Flower does not start.
    """
    app = app_folder()
    folder = RunFolder(Path(experiment.run.out))
    log = folder.path / LOG
    tail = Tail.from_end(folder.metrics)
    last: Event = {"event": "nothing"}
    with flower_sandbox(log) as sandbox:
        with log.open("ab") as output:
            process = _start_run(sandbox, app, experiment, output)
        alive = True
        while alive:
            alive = process.poll() is None
            for last in tail.new():
                listener(last)
            time.sleep(POLL_SECONDS if alive else 0)
        status = final_status(sandbox)
    if status != "finished:completed" or last["event"] != "run_finished":
        raise RunFailed(f"{_reason(last, status)}; Flower's log is {log}")


def app_folder() -> Path:
    """The checkout this package lies in: ``flwr run`` builds the app from it.

    Raises:
        UserError: the package is installed without its checkout.
    """
    folder = Path(__file__).resolve().parent.parent
    if not (folder / "pyproject.toml").is_file():
        raise UserError(
            f"{folder}: no pyproject.toml; the engine 'flower' needs a checkout: clone the project "
            "and install it with pip install -e, or use --engine inprocess"
        )
    return folder


def resources(experiment: Experiment) -> dict[str, int | float]:
    """Flower's simulation settings.

    A client gets as many CPUs as it has torch threads: the thread count changes rounding, so it
    is the same as in-process, and more clients at once would only get in each other's way. To
    train several at a time, set ``run.threads``.
    """
    cores = os.cpu_count() or 1
    threads = experiment.run.threads or cores
    settings: dict[str, int | float] = {
        "num-supernodes": experiment.federation.clients,
        "client-resources-num-cpus": threads,
        "init-args-num-cpus": max(cores, threads),
    }
    if _has_gpu():
        settings["client-resources-num-gpus"] = 1.0
    return settings


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _start_run(
    sandbox: Sandbox, app: Path, experiment: Experiment, output: IO[bytes]
) -> subprocess.Popen[bytes]:
    run_config = sandbox.home / "run-config.toml"
    run_config.write_text(toml_lines(flatten(experiment)), encoding="utf-8")
    settings = " ".join(f"{key}={value}" for key, value in resources(experiment).items())
    return subprocess.Popen(
        [program("flwr"), "run", str(app), CONNECTION, "--stream"]
        + ["--run-config", str(run_config), "--federation-config", settings],
        cwd=sandbox.working_directory,
        env=sandbox.environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def final_status(sandbox: Sandbox, patience: float = 30.0) -> str:
    """Ask for the status of the only run; wait a little for it to be final."""
    deadline = time.monotonic() + patience
    while True:
        status = parse_status(sandbox.command("list", CONNECTION, "--format", "json").stdout)
        if status.startswith("finished") or time.monotonic() > deadline:
            return status
        time.sleep(1.0)


def parse_status(text: str) -> str:
    """Return the status in the output of ``flwr list --format json``; ``unknown`` without one."""
    try:
        runs: list[dict[str, Any]] = json.loads(text)["runs"]
        return str(runs[0]["status"])
    except (ValueError, KeyError, IndexError):
        return "unknown"


def _reason(last: Event, status: str) -> str:
    if last["event"] == "run_stopped":
        return str(last["reason"]).removeprefix("UserError: ")
    return f"the run ended as '{status}' after the event '{last['event']}'"
