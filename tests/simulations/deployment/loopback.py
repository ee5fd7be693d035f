"""A federation of real processes on this machine: one server, sites, TLS, keys."""

from __future__ import annotations

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

from server.folder import read_events
from simulations.deployment.server.folder import (
    ServerFolder,
    ServerSettings,
    add_site,
    init_server,
)
from simulations.deployment.server.submit import starts, submit
from simulations.deployment.site.folder import agreed_labels, init_site
from simulations.engines.flower import free_port, members, stop_all
from simulations.run.experiment import Request, load_experiment

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


def done(*arguments: str) -> str:
    """What a ``deal`` command says, as a process of its own."""
    result = subprocess.run(
        [*DEAL, *arguments],
        capture_output=True,
        text=True,
        timeout=180 * SLOW,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
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

    def start(self, name: str, *arguments: str, path: Sequence[Path] = ()) -> None:
        """``deal ARGUMENTS`` in the background; modules of ``path`` come first."""
        where = os.pathsep.join(map(str, (*path, ROOT)))
        with (self.path / f"{name}.out").open("ab") as output:
            self.processes[name] = subprocess.Popen(
                [*DEAL, *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": where},
                start_new_session=True,
            )

    def start_server(self) -> None:
        self.start("server", "server", "start", str(self.folder.path))
        wait_for("server", self.answers, 60)

    def answers(self) -> bool:
        port = self.folder.settings().superlink_port
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    def site(self, name: str) -> Path:
        return self.path / "sites" / name

    def make(
        self,
        name: str,
        data: Path,
        experiment: Path | None = None,
        *,
        address: str = "",
        policy: str = OPEN,
        authority: Path | None = None,
    ) -> Path:
        """A site that takes part in the experiment's tasks; its public key."""
        labels = agreed_labels(load_experiment(Request(str(experiment)))) if experiment else {}
        trusted = authority or self.folder.authority
        init_site(self.site(name), data, name, address or self.address, trusted, labels)
        if policy:
            set_policy(self.site(name) / "site.toml", policy)
        return self.site(name) / "site.pub"

    def add(self, name: str, data: Path, experiment: Path | None = None, **settings: Any) -> None:
        """The same, registered."""
        add_site(self.folder, name, self.make(name, data, experiment, **settings))

    def start_site(self, name: str, path: Sequence[Path] = ()) -> None:
        self.start(name, "site", "start", str(self.site(name)), path=path)

    def refused(self, name: str) -> str:
        """What a site says that ends by itself, with an error."""
        assert self.processes.pop(name).wait(timeout=90 * SLOW) == 2
        return (self.path / f"{name}.out").read_text()

    def connections(self) -> list[str]:
        """What the SuperLink says of each registered key."""
        nodes = self.folder.flower.ask("supernode", "list", "deal")["nodes"]
        return [str(node["status"]) for node in nodes]

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
            wanted = {"event": "arrived", "asked": "train", "server_round": str(server_round)}
            return any(wanted.items() <= each.items() for each in self.log(name))

        wait_for(f"{name} asked in round {server_round}", asked, seconds)

    def log(self, name: str) -> list[dict[str, Any]]:
        return read_events(self.site(name) / "state" / "log.jsonl")

    def kill(self, name: str) -> None:
        """As a power cut would: every process of it, at once."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()
        home = (self.folder.path if name == "server" else self.site(name) / "state") / "flower"
        for member in members(home):
            with suppress(psutil.Error):
                member.kill()

    def submit(self, experiment: str | Path, *overrides: str) -> str:
        return submit(self.folder, str(experiment), overrides)[0].split()[1]

    def run(self, name: str) -> Path:
        return self.folder.runs / name

    def events(self, name: str) -> list[dict[str, Any]]:
        return read_events(self.run(name) / "metrics.jsonl")

    def wait_event(
        self, name: str, event: str, seconds: float, **fields: Any
    ) -> list[dict[str, Any]]:
        """Until the event has come; a run that stops instead ends the wait."""

        def seen() -> list[dict[str, Any]]:
            events, wanted = self.events(name), {"event": event, **fields}
            if event != "run_stopped":
                self.require_running(name)
            hit = any(wanted.items() <= each.items() for each in events)
            return events if hit else []

        return wait_for(f"{event} {fields}", seen, seconds)

    def require_running(self, name: str) -> None:
        """Fail where the run has stopped, and nobody has continued it."""
        stopped = [e for e in self.events(name) if e["event"] == "run_stopped"]
        if stopped and len(stopped) >= len(starts(self.run(name))):
            raise AssertionError(f"the run stopped: {stopped[-1]['reason']}")

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
def federation(path: Path) -> Iterator[Federation]:
    """A server that runs, without sites."""
    fed = Federation(path)
    ports = {"port": free_port(), "superlink_port": free_port()}
    init_server(fed.folder, ServerSettings(hosts=("127.0.0.1",), **ports))
    try:
        fed.start_server()
        yield fed
    finally:
        fed.end()
