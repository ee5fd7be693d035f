"""A federation of real processes on this machine: one server, sites, TLS, keys."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from simulations.deployment.server.folder import ServerFolder, registered
from simulations.engines.flower import free_port, members, stop_all

ROOT = Path(__file__).parents[3]
DEAL = [sys.executable, "-m", "simulations.cli"]
SLOW = float(os.environ.get("DEAL_TEST_SLOW", "1"))
"""How many times slower this machine is than two idle cores: a federation that gets a tenth of them
misses every deadline. It stretches deadlines, and what tests wait for."""


def wait_for(what: str, condition: Callable[[], Any], seconds: float) -> Any:
    end = time.monotonic() + SLOW * seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.3)
    raise AssertionError(f"{what}: not within {SLOW * seconds:g} s")


def deal(*arguments: str, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, *DEAL, *arguments],
        capture_output=True,
        text=True,
        timeout=180 * SLOW,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def done(*arguments: str, prefix: Sequence[str] = ()) -> str:
    result = deal(*arguments, prefix=prefix)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


OPEN = 'metrics = "clear"\nshare_num_examples = true\nmin_records = 1\n'
"""A policy under which a site trains without differential privacy, and says how well."""


def set_policy(site_file: Path, policy: str) -> None:
    """Write another policy than that of ``deal site init``."""
    head, found, _ = site_file.read_text().partition("[policy]")
    assert found
    site_file.write_text(f"{head}[policy]\n{policy}\n")


@dataclass
class Federation:
    """Processes and folders below ``path``."""

    path: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def folder(self) -> ServerFolder:
        return ServerFolder(self.path / "server")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.folder.settings().superlink_port}"

    def start(
        self, name: str, *arguments: str, prefix: Sequence[str] = ()
    ) -> subprocess.Popen[bytes]:
        with (self.path / f"{name}.out").open("ab") as output:
            process = subprocess.Popen(
                [*prefix, *DEAL, *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                start_new_session=True,
            )
        self.processes[name] = process
        return process

    def start_server(self) -> None:
        self.start("server", "server", "start", str(self.folder.path))
        wait_for("server", self.answers, 60)

    def answers(self) -> bool:
        try:
            with socket.create_connection(
                ("127.0.0.1", self.folder.settings().superlink_port), timeout=1
            ):
                return True
        except OSError:
            return False

    def site(self, name: str) -> Path:
        return self.path / "sites" / name

    def add(
        self,
        name: str,
        data: Path,
        experiment: Path | None = None,
        *options: str,
        address: str = "",
        policy: str = OPEN,
    ) -> None:
        """Make a site that takes part in the experiment's tasks, register its key."""
        agreed = ("--experiment", str(experiment)) if experiment else ()
        done(
            *("site", "init", str(self.site(name)), "--data", str(data), "--name", name),
            *(
                "--server",
                address or self.address,
                "--certificate",
                str(self.folder.authority),
                *agreed,
                *options,
            ),
        )
        set_policy(self.site(name) / "site.toml", policy)
        key = str(self.site(name) / "site.pub")
        done("server", "add-site", name, key, "--dir", str(self.folder.path))

    def start_site(self, name: str, prefix: Sequence[str] = ()) -> None:
        self.start(name, "site", "start", str(self.site(name)), prefix=prefix)

    def members(self, name: str) -> list[Any]:
        """The processes that work for a site, without the SuperNode that holds its place."""
        found = []
        for process in members(self.site(name) / "state" / "flower"):
            with suppress(psutil.Error):
                if {"clientapp", "client.app"} & {*process.cmdline()}:
                    found.append(process)
        return found

    def wait_asked(self, name: str, server_round: int, seconds: float = 120) -> None:
        """Until the site has begun to work on its request of a round."""

        def asked() -> bool:
            return any(
                e["event"] == "arrived" and e["server_round"] == str(server_round)
                for e in self.log(name)
                if e["asked"] == "train"
            )

        wait_for(f"{name} asked in round {server_round}", asked, seconds)

    def log(self, name: str) -> list[dict[str, Any]]:
        path = self.site(name) / "state" / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def kill(self, name: str) -> None:
        """As a power cut would: every process of it, at once."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()
        home = (self.folder.path if name == "server" else self.site(name) / "state") / "flower"
        for member in members(home):
            with suppress(psutil.Error):
                member.kill()

    def submit(self, *arguments: str) -> str:
        out = done("submit", *arguments, "--dir", str(self.folder.path))
        return out.split()[1]

    def run(self, name: str) -> Path:
        return self.folder.runs / name

    def events(self, name: str) -> list[dict[str, Any]]:
        path = self.run(name) / "metrics.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines()]

    def wait_event(
        self, name: str, event: str, seconds: float, **fields: Any
    ) -> list[dict[str, Any]]:
        """Until the event has come; a run that stops instead ends the wait."""

        def seen() -> list[dict[str, Any]]:
            events = self.events(name)
            hits = [
                e
                for e in events
                if e["event"] == event and all(e.get(k) == v for k, v in fields.items())
            ]
            if event != "run_stopped":
                self.require_running(name)
            return events if hits else []

        return wait_for(f"{event} {fields}", seen, seconds)

    def require_running(self, name: str) -> None:
        """Fail where the run has stopped, and nobody has continued it."""
        stopped = [e for e in self.events(name) if e["event"] == "run_stopped"]
        if stopped and len(stopped) >= len(self.starts(name)):
            raise AssertionError(f"the run stopped: {stopped[-1]['reason']}")

    def starts(self, name: str) -> list[str]:
        return (self.run(name) / "starts.jsonl").read_text().splitlines()

    def names(self) -> list[str]:
        return list(registered(self.folder))

    def end(self) -> None:
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        stop_all(self.folder.flower.path)
        for site in (self.path / "sites").glob("*"):
            stop_all(site / "state" / "flower")


@contextmanager
def federation(
    path: Path, hosts: Sequence[str] = ("127.0.0.1",), port: int = 0
) -> Iterator[Federation]:
    """A server that runs, without sites."""
    fed = Federation(path)
    link = free_port()
    done(
        *("server", "init", str(path / "server")),
        *(word for host in hosts for word in ("--host", host)),
        *("--superlink-port", str(link), "--port", str(port or free_port())),
    )
    try:
        fed.start_server()
        yield fed
    finally:
        fed.end()
