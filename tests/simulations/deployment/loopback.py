"""A federation of real processes on this machine: one server, sites, TLS, keys."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from simulations.deployment.registry import registered
from simulations.deployment.server_folder import ServerFolder, server_folder
from simulations.flower_sandbox import stop_all

ROOT = Path(__file__).parents[3]
DEAL = [sys.executable, "-m", "simulations.cli"]
SLOW = float(os.environ.get("DEAL_TEST_SLOW", "1"))
"""How many times slower this machine is than two idle cores: a federation that gets a tenth of them
misses every deadline. It stretches deadlines, and what tests wait for."""
LABELS = {"laboratory": ["Pathology", "Pharmacology"], "surgery": ["Radiology", "Surgery"]}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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


@dataclass
class Federation:
    """Processes and folders below ``path``."""

    path: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def folder(self) -> ServerFolder:
        return server_folder(str(self.path / "server"))

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

    def add(self, name: str, data: Path, *options: str, address: str = "") -> None:
        """Make a site, register its key."""
        done(
            *("site", "init", str(self.site(name)), "--data", str(data), "--name", name),
            *(
                "--server",
                address or self.address,
                "--certificate",
                str(self.folder.authority),
                *options,
            ),
        )
        key = str(self.site(name) / "site.pub")
        done("server", "add-site", name, key, "--dir", str(self.folder.path))

    def start_site(self, name: str, prefix: Sequence[str] = ()) -> None:
        self.start(name, "site", "start", str(self.site(name)), prefix=prefix)

    def members(self, name: str) -> list[Any]:
        """The processes that work for a site, without the SuperNode that holds its place."""
        found = []
        for process in _members(self.site(name) / "state" / "flower"):
            with suppress(psutil.Error):
                if {"flwr-clientapp", "client.worker"} & {
                    word.rpartition("/")[2] for word in process.cmdline()
                }:
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
        for member in _members(home):
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


def _members(home: Path) -> list[Any]:
    from simulations.flower_sandbox import members

    return members(home)


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


Rows = Sequence[Mapping[str, str]]


def questions(train: int = 18, test: int = 9) -> dict[str, dict[str, list[dict[str, str]]]]:
    """Task to split to rows of real questions, so many of a label, always in the same order;
    where there are too few tests, training rows that nobody trains on are some."""
    from deal_core.config import DataConfig
    from deal_core.data import open_source

    source = open_source(DataConfig(tasks=tuple(LABELS)))
    found: dict[str, dict[str, list[dict[str, str]]]] = {}
    for task, labels in LABELS.items():
        data = source.load(task)
        rows: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
        for label in labels:
            known, kept = ([e for e in s if e.label == label] for s in (data.train, data.test))
            for split, examples in (
                ("train", known[:train]),
                ("test", [*kept, *known[train:]][:test]),
            ):
                rows[split] += [{"text": e.text, "label": label} for e in examples]
        found[task] = rows
    return found


def write_rows(path: Path, rows: Rows) -> None:
    import pandas as pd

    table = pd.DataFrame(list(rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    elif path.suffix == ".jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        table.to_parquet(path)


SITES = {"north": ".csv", "south": ".jsonl", "west": ".parquet"}


def divide(folder: Path, sites: Mapping[str, str] = SITES, train: int = 18, test: int = 9) -> None:
    """``folder/SITE/TASK/SPLIT`` in a format for each site, and ``folder/all`` with a column
    that says whose row it is."""
    for task, splits in questions(train, test).items():
        for split, rows in splits.items():
            whole = []
            for k, (site, suffix) in enumerate(sites.items()):
                own = rows[k :: len(sites)]
                write_rows(folder / site / task / f"{split}{suffix}", own)
                whole += [{**row, "site": site} for row in own]
            write_rows(folder / "all" / task / f"{split}.jsonl", whole)


SHORT = """\
[data]
source = "sites"
tasks = {tasks}
[data.labels]
laboratory = ["Pathology", "Pharmacology"]
surgery = ["Radiology", "Surgery"]
[federation]
rounds = {rounds}
deadline_seconds = {deadline}
connect_seconds = {connect}
[train]
max_length = 32
batch_size = 4
precision = "float32"
[run]
threads = 1
"""


def experiment_file(
    path: Path,
    tasks: Sequence[str] = tuple(LABELS),
    rounds: int = 1,
    deadline: float = 300,
    connect: float = 60,
) -> Path:
    path.write_text(
        SHORT.format(
            tasks=json.dumps(list(tasks)),
            rounds=rounds,
            deadline=SLOW * deadline,
            connect=SLOW * connect,
        )
    )
    return path


def alone(path: Path, data: Path, out: Path, sites: Sequence[str]) -> Path:
    """The same experiment in one process, each client with the rows of its site."""
    from deal_core.experiment_file import apply_overrides, parse_experiment, read_toml
    from simulations.inprocess import run_inprocess

    out.mkdir()
    overrides = [
        "data.source=files",
        f'data.path="{data / "all"}"',
        "data.partition.kind=column",
        "data.partition.column=site",
        f"federation.clients={len(sites)}",
        f'run.out="{out}"',
        "run.workers=1",
    ]
    tables = apply_overrides(read_toml(path), overrides)
    run_inprocess(parse_experiment(tables, "test"), lambda event: None)
    return out


def same_adapter(one: Path, two: Path) -> None:
    """The adapters of two run folders agree to 1e-4."""
    import numpy as np
    from safetensors.numpy import load_file

    first, second = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (one, two))
    assert first.keys() == second.keys() != set()
    for key, value in first.items():
        np.testing.assert_allclose(value, second[key], atol=1e-4)


class Cable:
    """A network cable between a site and the server, that can be pulled out."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._open: list[socket.socket] = []
        self._whole = threading.Event()
        self._whole.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._whole.clear()
        for end in self._open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def mend(self) -> None:
        self._whole.set()

    def close(self) -> None:
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if not self._whole.is_set():
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self._target), timeout=5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            self._open += [near, far]
            threading.Thread(target=_carry, args=(near, far), daemon=True).start()


@contextmanager
def cabled(path: Path, data: Path) -> Iterator[tuple[Federation, Cable]]:
    """A server and its sites, all running; the cable of the one named north can be pulled out."""
    with federation(path) as fed:
        cable = Cable(fed.folder.settings().superlink_port)
        for site in SITES:
            fed.add(site, data / site, address=f"127.0.0.1:{cable.port}" if site == "north" else "")
            fed.start_site(site)
        try:
            yield fed, cable
        finally:
            cable.close()


def _carry(near: socket.socket, far: socket.socket) -> None:
    """Both ways, until one end is closed."""
    with near, far:
        back = threading.Thread(target=_pump, args=(far, near), daemon=True)
        back.start()
        _pump(near, far)
        back.join()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
