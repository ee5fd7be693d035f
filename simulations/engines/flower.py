"""Engine ``flower``: ``flwr run`` on Flower's simulation runtime, for many cores or GPUs.

What the apps write to ``metrics.jsonl`` is followed for the listener. Whether the run succeeded
is asked of the SuperLink: ``flwr run`` exits with 0 also when the run has failed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deal_core.config.experiment import Experiment
from deal_core.config.run_config import to_run_config
from deal_core.errors import UserError
from server.events import Listener, RunEvent, plain_reason
from server.folder import RunFolder
from simulations.engines.flower_sandbox import CONNECTION, Sandbox, flower_sandbox, program
from simulations.engines.workers import Workers, as_run_by, this_machine
from simulations.output.toml import toml_lines

LOG = "flower.log"
"""Flower's own output, in the run folder."""
BUNDLE = Path(__file__).resolve().parents[1] / "bundle"
"""What ``flwr run`` builds and sends: it imports the installed apps."""
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

    def new(self) -> Iterator[RunEvent]:
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
        UserError: Flower does not start.
    """
    folder = RunFolder(Path(experiment.run.out))
    log = folder.path / LOG
    tail = Tail.from_end(folder.metrics)
    last: RunEvent = {"event": "nothing"}
    with flower_sandbox(log) as sandbox:
        process = sandbox.start(run_command(sandbox, experiment), log)
        alive = True
        while alive:
            alive = process.poll() is None
            for last in tail.new():
                listener(last)
            time.sleep(POLL_SECONDS if alive else 0)
        outcome = final_outcome(sandbox)
    if outcome.status != "finished:completed" or last["event"] != "run_finished":
        raise RunFailed(f"{reason(last, outcome)}; Flower's log is {log}")


def resources(experiment: Experiment, workers: Workers) -> dict[str, int | float]:
    """Return Flower's simulation settings: Ray makes as many actors as fit, and exactly
    ``workers.count`` fit."""
    settings: dict[str, int | float] = {
        "num-supernodes": experiment.federation.clients,
        "client-resources-num-cpus": workers.threads,
        "init-args-num-cpus": workers.count * workers.threads,
    }
    if workers.gpus:
        settings["client-resources-num-gpus"] = workers.gpus
    return settings


def run_command(sandbox: Sandbox, experiment: Experiment) -> list[str]:
    """Return the ``flwr run`` of this experiment; ends when the run has ended."""
    workers = this_machine(experiment)
    run_config = sandbox.home / "run-config.toml"
    settled = as_run_by(workers, experiment)
    run_config.write_text(toml_lines(to_run_config(settled)), encoding="utf-8")
    settings = " ".join(f"{key}={value}" for key, value in resources(experiment, workers).items())
    command = [program("flwr"), "run", str(BUNDLE), CONNECTION, "--stream"]
    return [*command, "--run-config", str(run_config), "--federation-config", settings]


@dataclass(frozen=True)
class Outcome:
    """What the SuperLink says of a run."""

    status: str
    details: str = ""


def final_outcome(sandbox: Sandbox, patience: float = 30.0) -> Outcome:
    """Ask for the status of the only run; wait a little for it to be final."""
    deadline = time.monotonic() + patience
    while True:
        outcome = parse_outcome(sandbox.command("list", CONNECTION, "--format", "json").stdout)
        if outcome.status.startswith("finished") or time.monotonic() > deadline:
            return outcome
        time.sleep(1.0)


def parse_outcome(text: str) -> Outcome:
    """Read the output of ``flwr list --format json``; ``unknown`` where there is no run."""
    try:
        run: dict[str, Any] = json.loads(text)["runs"][0]
        return Outcome(str(run["status"]), str(run.get("status-details", "")))
    except (ValueError, KeyError, IndexError):
        return Outcome("unknown")


def reason(last: RunEvent, outcome: Outcome) -> str:
    """Return why a run failed, on one line; what the server itself said comes first."""
    if last["event"] == "run_stopped":
        return plain_reason(last["reason"])
    said = f"the run ended as '{outcome.status}' after the event '{last['event']}'"
    return f"{said}: {outcome.details}".partition("\n")[0]
