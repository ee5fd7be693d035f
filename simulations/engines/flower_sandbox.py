"""A SuperLink of our own: private home, port and working directory; it ends with us.

Flower's managed local SuperLink outlives its run, serves every checkout on the machine, and its
Ray workers import ``client`` from the folder in which it was first started. So each run starts
its own, in an empty folder, and stops all of its processes. They are known by ``FLWR_HOME`` in
their environment: they leave their process group.
"""

from __future__ import annotations

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

import psutil

from deal_core.errors import UserError
from simulations.engines.flower_environment import flower_environment
from simulations.engines.interrupt import uninterrupted

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
