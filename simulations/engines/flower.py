"""The environment of every program of Flower's: a private home, nothing phoned home."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from deal_core.config.experiment import Experiment
from deal_core.config.run_config import to_run_config
from deal_core.errors import UserError
from server.folder import Listener, RunEvent, RunFolder, plain_reason
from simulations.engines.interrupt import uninterrupted
from simulations.engines.worker_pool import Workers, as_run_by, this_machine
from simulations.output.files import toml_lines


def flower_environment(home: Path) -> dict[str, str]:
    """Return the environment of this process with Flower's own settings in it.

    Args:
        home: where Flower keeps its files.
    """
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }


CONNECTION = "deal"
"""Name of the SuperLink in the private Flower configuration."""
START_SECONDS = 60.0
STOP_SECONDS = 3.0
LONGEST_RAY_FOLDER = 40
"""Ray puts sockets below its folder, and a socket's path has at most about 100 characters."""


@dataclass(frozen=True)
class Sandbox:
    """A running SuperLink in simulation mode.

    Attributes:
        home: private ``FLWR_HOME``.
        environment: for every process that belongs to this SuperLink.
        children: what :meth:`start` has started.
    """

    home: Path
    environment: dict[str, str]
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def working_directory(self) -> Path:
        """Empty, so that nothing in it can be imported instead of the app."""
        return self.home / "empty"

    def start(self, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a process that writes to ``log`` and ends with the sandbox."""
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                cwd=self.working_directory,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal is for us alone
            )
        self.children.append(process)
        return process

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run ``flwr ARGUMENTS`` to its end."""
        return subprocess.run(
            [program("flwr"), *arguments],
            cwd=self.working_directory,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )


def program(name: str) -> str:
    """Return the path of a console script of this Python environment.

    Raises:
        UserError: it is not installed.
    """
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise UserError(f"{path}: not there; install flwr[simulation] in this environment")
    return str(path)


@contextmanager
def flower_sandbox(log: Path) -> Iterator[Sandbox]:
    """Yield a SuperLink that was started here; it is stopped, with all it started, at the end.

    Args:
        log: receives what the SuperLink prints.

    Raises:
        UserError: the SuperLink does not start.
    """
    home = Path(tempfile.mkdtemp(prefix="deal-")).resolve()
    sandbox = Sandbox(home, _environment(home))
    try:
        sandbox.working_directory.mkdir()
        port = _free_port()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n'
            f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n',
            encoding="utf-8",
        )
        _start_superlink(sandbox, port, log)
        yield sandbox
    finally:
        with uninterrupted():
            stop_all(home)
            for child in sandbox.children:
                child.wait()
            shutil.rmtree(home, ignore_errors=True)


def _environment(home: Path) -> dict[str, str]:
    environment = flower_environment(home)
    # Somebody else's Ray cluster must not be joined, and its folder not be filled.
    environment.pop("RAY_ADDRESS", None)
    if len(str(home)) <= LONGEST_RAY_FOLDER:
        environment["RAY_TMPDIR"] = str(home)
    return environment


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start_superlink(sandbox: Sandbox, port: int, log: Path) -> None:
    command = [program("flower-superlink"), "--insecure", "--simulation"]
    command += ["--isolation", "subprocess", "--disable-runtime-dependency-installation"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    process = sandbox.start(command, log)
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if _healthy(port):
            return
        time.sleep(0.2)
    raise UserError(f"Flower's SuperLink did not start; see {log}")


def _healthy(port: int) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/health", timeout=1) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def members(home: Path, variable: str = "FLWR_HOME") -> list[psutil.Process]:
    """Return all processes that have this folder in a variable of their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(variable) == str(home):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def stop_all(home: Path, variable: str = "FLWR_HOME") -> None:
    """Ask every member to end, then end it; repeated, because members start others."""
    for process in members(home, variable):
        with suppress(psutil.Error):
            process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    while (left := _left(home, variable)) and time.monotonic() < deadline:
        psutil.wait_procs(left, timeout=0.5)
    while left := _left(home, variable):
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=0.5)
        if time.monotonic() > deadline + STOP_SECONDS:
            return


def _left(home: Path, variable: str) -> list[psutil.Process]:
    """Return the members; looks again where there is none: while a process starts its program, its
    environment reads as empty."""
    found = members(home, variable)
    if not found:
        time.sleep(0.05)
        found = members(home, variable)
    return found


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
