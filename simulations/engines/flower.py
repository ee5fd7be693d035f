"""Flower's programs in a private home, with nothing phoned home; and the engines that run an
experiment with them: ``flower``, its simulation runtime, and ``loopback``, a deployment on this
machine."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil

from deal_core.config.experiment import Experiment
from deal_core.config.file import to_run_config
from deal_core.errors import UserError
from deal_core.installed import ROOT, import_path
from server.folder import Listener, RunEvent, RunFolder, plain_reason
from simulations.engines import uninterrupted
from simulations.engines.worker_pool import Workers, as_run_by, this_machine
from simulations.output import toml_lines

LOCAL = "127.0.0.1"
BUNDLE = ROOT / "simulations" / "bundle"
"""What ``flwr run`` builds and sends: it imports the installed apps."""
CONNECTION = "deal"
"""Name of the SuperLink in the private Flower configuration."""
COMMAND_SECONDS = 120.0
PR_SET_PDEATHSIG = 1
"""Of Linux's ``prctl.h``."""
START_SECONDS = 60.0
STOP_SECONDS = 3.0
POLL_SECONDS = 0.2
LONGEST_RAY_FOLDER = 40
"""Ray puts sockets below its folder, and a socket's path has at most about 100 characters."""
LOG = "flower.log"
"""Flower's own output, in the run folder."""


@dataclass(frozen=True)
class FlowerHome:
    """A private ``FLWR_HOME``."""

    path: Path

    @property
    def empty(self) -> Path:
        """Working directory: nothing in it can be imported instead of the app."""
        return self.path / "empty"

    def environment(self) -> dict[str, str]:
        """Return the environment for every program of Flower's; this checkout comes first among
        what it imports, but for an app, which Flower puts before it."""
        self.empty.mkdir(parents=True, exist_ok=True)
        direct = os.environ.get("no_proxy", os.environ.get("NO_PROXY", ""))
        return {
            **os.environ,
            "no_proxy": ",".join(filter(None, [direct, LOCAL, "localhost"])),  # its own parts
            "FLWR_HOME": str(self.path),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
            "PYTHONPATH": import_path(),
        }

    def connect(self, address: str, certificate: Path | None = None) -> None:
        """Write the connection that ``flwr`` uses; without a certificate it is plain HTTP."""
        trust = {"root-certificates": str(certificate)} if certificate else {"insecure": True}
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
            f"{toml_lines({'address': address, **trust})}",
            encoding="utf-8",
        )

    def ask(self, *arguments: str) -> dict[str, Any]:
        """Return what ``flwr ARGUMENTS --format json`` says.

        Raises:
            UserError: Flower refuses, or the SuperLink does not answer; where nothing listens this
                is said at once, and not after ``flwr`` has tried for half a minute.
        """
        config = tomllib.loads((self.path / "config.toml").read_text(encoding="utf-8"))
        address = config["superlink"][CONNECTION]["address"]
        if not answers(int(address.rpartition(":")[2])):
            raise UserError(f"nothing listens at {address}; start the server: deal server start")
        try:
            environment = self.environment()
            done = subprocess.run(
                [program("flwr"), *arguments, "--format", "json"],
                cwd=self.empty,
                env=environment,
                capture_output=True,
                text=True,
                timeout=COMMAND_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise UserError(
                f"flwr {arguments[0]}: no answer after {COMMAND_SECONDS:g} s; "
                "is the server running (deal server start)?"
            ) from None
        answer = _json_in(done.stdout)
        if not answer.get("success"):
            said = str(answer.get("error-message") or done.stderr or done.stdout)
            reason = " ".join(said.split())[-300:] or f"exit code {done.returncode}"
            raise UserError(
                f"flwr {arguments[0]}: {reason} (is the server running? deal server start)"
            )
        return answer


def _json_in(text: str) -> dict[str, Any]:
    """Return the JSON object in an output that may have lines before it."""
    start = text.find("{")
    try:
        found = json.loads(text[start:]) if start >= 0 else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def program(name: str) -> str:
    """Return the path of a console script of this environment, or raise UserError."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise UserError(f"{path}: not there; install flwr[simulation] in this environment")
    return str(path)


def free_port() -> int:
    """Return a free local port."""
    with socket.socket() as probe:
        probe.bind((LOCAL, 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    """Whether something listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex((LOCAL, port)) == 0


Start = Callable[[list[str], Path], "subprocess.Popen[bytes]"]


def dying_with(parent: int) -> Callable[[], None] | None:
    """Return what a child does first: it asks the kernel for SIGTERM as soon as its parent has
    ended, however that was. None where there is no such kernel."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, kill = ctypes.CDLL(None).prctl, os.kill

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it has ended meanwhile
            kill(os.getpid(), signal.SIGTERM)

    return ask


@contextmanager
def flower_sandbox(
    log: Path, nodes: int = 0, variables: Mapping[str, str] = MappingProxyType({})
) -> Iterator[tuple[FlowerHome, Start]]:
    """Start a SuperLink that writes to ``log``; stop all at the end.

    Args:
        log: of all that is started.
        nodes: how many SuperNodes, each with its number and a home of its own; 0: simulation mode.
        variables: of the environment of all.

    Yields:
        Its home, and what starts a command that belongs to it and writes to a log.

    Raises:
        UserError: it does not start.
    """
    path = Path(tempfile.mkdtemp(prefix="deal-")).resolve()
    home, children = FlowerHome(path), list[subprocess.Popen[bytes]]()
    environment = home.environment() | dict(variables)
    # Another Ray cluster must not be joined, and its folder not be filled.
    environment.pop("RAY_ADDRESS", None)
    if len(str(path)) <= LONGEST_RAY_FOLDER:
        environment["RAY_TMPDIR"] = str(path)

    def start(command: list[str], log: Path, own: str = "") -> subprocess.Popen[bytes]:
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                cwd=home.empty,
                env=environment | {"FLWR_HOME": str(path / own)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal is for us alone
                preexec_fn=dying_with(os.getpid()),
            )
        children.append(process)
        return process

    try:
        port = free_port()
        home.connect(f"{LOCAL}:{port}")
        command = [program("flower-superlink"), "--insecure", *([] if nodes else ["--simulation"])]
        command += ["--isolation", "subprocess", "--disable-runtime-dependency-installation"]
        process = start([*command, "--host", LOCAL, "--port", str(port)], log)
        deadline = time.monotonic() + START_SECONDS
        while not _healthy(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise UserError(f"Flower's SuperLink did not start; see {log}")
            time.sleep(POLL_SECONDS)
        for number in range(nodes):
            command = [program("flower-supernode"), "--insecure", "--superlink", f"{LOCAL}:{port}"]
            command += ["--host", LOCAL, "--port", str(free_port()), "--node-config"]
            command += [f"partition-id={number} num-partitions={nodes}"]
            start(command, log, f"node-{number}")
        yield home, start
    finally:
        with uninterrupted():
            for number in range(nodes):
                stop_all(path / f"node-{number}")
            stop_all(path)
            for child in children:
                child.wait()
            shutil.rmtree(path, ignore_errors=True)


def _healthy(port: int) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{LOCAL}:{port}/health", timeout=1) as response:
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


def run_flower(
    experiment: Experiment,
    listener: Listener,
    app: str = "",
    variables: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Run the experiment to its end.

    Args:
        experiment: its ``run.engine`` says in which of Flower's runtimes.
        listener: called with every event.
        app: source of the apps; empty: those that are installed.
        variables: of the environment of all processes.

    Raises:
        UserError: it did not get there: the reason, and the place of Flower's log.
    """
    nodes = experiment.federation.clients if experiment.run.engine == "loopback" else 0
    folder = RunFolder(Path(experiment.run.out))
    log = folder.path / LOG
    tail = Tail.from_end(folder.metrics)
    last: RunEvent = {"event": "nothing"}
    with flower_sandbox(log, nodes, variables) as (home, start):
        process = start(run_command(home, experiment, app), log)
        alive = True
        while alive:
            alive = process.poll() is None
            for last in tail.new():
                listener(last)
            time.sleep(POLL_SECONDS if alive else 0)
    if last["event"] != "run_finished":
        stopped = last["event"] == "run_stopped"
        said = f"the run ended after the event '{last['event']}'"
        raise UserError(f"{plain_reason(last['reason']) if stopped else said}; Flower's log: {log}")


def run_command(home: FlowerHome, experiment: Experiment, app: str) -> list[str]:
    """Return the ``flwr run`` of this experiment, with the source of its apps; ends when the run
    has ended."""
    bundle = BUNDLE
    if app:
        bundle = home.path / "bundle"
        shutil.copytree(BUNDLE, bundle)
        (bundle / "deal_app.py").write_text(app, encoding="utf-8")
    workers = this_machine(experiment)
    run_config = home.path / "run-config.toml"
    settled = as_run_by(workers, experiment)
    run_config.write_text(toml_lines(to_run_config(settled)), encoding="utf-8")
    command = [program("flwr"), "run", str(bundle), CONNECTION, "--stream"]
    command += ["--run-config", str(run_config)]
    if experiment.run.engine == "loopback":
        return command
    settings = " ".join(f"{key}={value}" for key, value in resources(experiment, workers).items())
    return [*command, "--federation-config", settings]


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
