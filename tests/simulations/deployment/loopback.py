"""A federation of real processes on this machine: one server, sites, TLS, keys; its data are real
questions, divided among sites, and its experiment runs in seconds, also in one process to compare
with."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from safetensors.numpy import load_file

from deal_core.config.data import DataConfig
from deal_core.config.file import apply_overrides, parse_experiment, read_toml
from deal_core.data import open_source
from server.folder import read_events
from simulations.deployment.demo import Commands
from simulations.deployment.keys import fingerprint_of_line, read_public_key
from simulations.deployment.server.folder import (
    ServerFolder,
    ServerSettings,
    add_site,
    init_server,
)
from simulations.deployment.server.submit import starts, submit
from simulations.deployment.site.check import check_site
from simulations.deployment.site.folder import agreed_labels, init_site
from simulations.engines.flower import BUNDLE, answers, free_port, members
from simulations.engines.inprocess import run_inprocess
from simulations.run.experiment import Request, load_experiment

ROOT = Path(__file__).parents[3]
DEAL = [sys.executable, "-m", "simulations.cli"]
SLOW = float(os.environ.get("DEAL_TEST_SLOW", "1"))
"""How many times slower this machine is than two idle cores: a federation that gets a tenth of them
misses every deadline. It stretches deadlines, and what tests wait for."""
SITES = {"north": ".csv", "south": ".jsonl", "west": ".parquet"}
LABELS = {"laboratory": ["Pathology", "Pharmacology"], "surgery": ["Radiology", "Surgery"]}

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
[train]
max_length = 32
batch_size = 4
precision = "float32"
[method.prototype]
enabled = "off"  # sites keep sums by default
[run]
threads = 1
"""


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


@dataclass
class Federation:
    """Processes and folders below ``path``."""

    path: Path
    folder: ServerFolder
    deal: Commands

    @property
    def port(self) -> int:
        return self.folder.settings().superlink_port

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start_server(self) -> None:
        wait_for("end of the server before it", lambda: not answers(self.port), 60)
        self.deal.start("server", "server", "start", self.folder.path)
        wait_for("server", lambda: answers(self.port), 60)

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
        if policy:  # another than that of ``deal site init``
            settings = self.site(name) / "site.toml"
            head, found, _ = settings.read_text().partition("[policy]")
            assert found
            settings.write_text(f"{head}[policy]\n{policy}\n")
        return self.site(name) / "site.pub"

    def add(self, name: str, data: Path, experiment: Path | None = None, **settings: Any) -> None:
        """The same, registered."""
        add_site(self.folder, name, self.make(name, data, experiment, **settings))

    def join(
        self,
        names: Collection[str],
        data: Path,
        experiment: Path,
        *,
        pinned: bool = False,
        **settings: Any,
    ) -> None:
        """Sites of these names, each with its own folder of the data, and started; ``pinned``:
        each knows the others' keys, and has to make secure sums."""
        for name in names:
            self.add(name, data / name, experiment, **settings)
        for name in names if pinned else ():
            self.pin(name, names)
        for name in names:
            self.start_site(name)

    def pin(self, name: str, names: Collection[str]) -> None:
        """As if each institution had read out its fingerprint, which the server shows as well."""
        shown = {
            each: fingerprint_of_line(read_public_key(self.site(each) / "site.pub"))
            for each in names
        }
        others = "".join(f'{peer} = "{shown[peer]}"\n' for peer in names if peer != name)
        path = self.site(name) / "site.toml"
        path.write_text(path.read_text().replace("[policy]", f"[peers]\n{others}\n[policy]", 1))
        checked = "\n".join(check_site(self.site(name), offline=True).lines)
        assert f"read out by telephone: {shown[name]}" in checked
        assert "secure sums: required by the policy, with" in checked

    def start_site(self, name: str, path: Sequence[Path] = ()) -> None:
        """Modules of ``path`` come first."""
        self.deal.environment["PYTHONPATH"] = os.pathsep.join(map(str, (*path, ROOT)))
        self.deal.start(name, "site", "start", self.site(name))

    def refused(self, name: str) -> str:
        """What a site says that ends by itself, with an error."""
        assert self.deal.started.pop(name).wait(timeout=90 * SLOW) == 2
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
                if re.search(r"\b(forkserver|client\.app)\b", " ".join(process.cmdline())):
                    found.append(process)
        return found

    def wait_asked(self, name: str, server_round: int, event: str = "arrived") -> None:
        """Until the site has begun to work on its request of a round, or has answered it."""
        wanted = {"event": event, "asked": "train", "server_round": str(server_round)}

        def asked() -> bool:
            return any(wanted.items() <= each.items() for each in self.log(name))

        wait_for(f"{name}: {event} in round {server_round}", asked, 240)

    def log(self, name: str) -> list[dict[str, Any]]:
        return read_events(self.site(name) / "state" / "log.jsonl")

    def kill(self, name: str) -> None:
        """As a power cut would: every process of it, at once."""
        process = self.deal.started.pop(name)
        process.kill()
        process.wait()
        home = (self.folder.path if name == "server" else self.site(name) / "state") / "flower"
        for member in members(home):
            with suppress(psutil.Error):
                member.kill()

    def submit(self, experiment: str | Path, *overrides: str) -> str:
        return submit(self.folder, str(experiment), overrides)[0].split()[1]

    @contextmanager
    def frozen(self, name: str) -> Iterator[None]:
        """The processes that work for a site stand still."""
        stopped = self.members(name)
        for process in stopped:
            process.send_signal(signal.SIGSTOP)
        yield
        for process in stopped:
            process.send_signal(signal.SIGCONT)

    def status(self, run: str) -> str:
        """What ``deal status`` says of a run."""
        return done("status", run, "--dir", str(self.folder.path))

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


@contextmanager
def federation(path: Path) -> Iterator[Federation]:
    """A server that runs, without sites."""
    folder = ServerFolder(path / "server")
    ports = {"port": free_port(), "superlink_port": free_port()}
    init_server(folder, ServerSettings(hosts=("127.0.0.1",), **ports))
    with Commands(path, Console(quiet=True)) as deal:
        fed = Federation(path, folder, deal)
        fed.start_server()
        yield fed


def experiment_file(
    path: Path,
    tasks: Sequence[str] = tuple(LABELS),
    rounds: int = 1,
    deadline: float = 300,
) -> Path:
    asked = {"tasks": json.dumps(list(tasks)), "rounds": rounds, "deadline": SLOW * deadline}
    path.write_text(SHORT.format(**asked))
    return path


def alone(path: Path, data: Path, out: Path, sites: Sequence[str]) -> Path:
    """The same experiment in one process, each client with the rows of its site."""
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
    first, second = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (one, two))
    assert first.keys() == second.keys() != set()
    for key, value in first.items():
        np.testing.assert_allclose(value, second[key], atol=1e-4)


def questions(train: int = 18, test: int = 9) -> dict[str, dict[str, list[dict[str, str]]]]:
    """Task to split to rows of real questions, so many of a label, always in the same order;
    where there are too few tests, training rows that nobody trains on are some."""
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


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    import pandas as pd

    table = pd.DataFrame(list(rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    elif path.suffix == ".jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        table.to_parquet(path)


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


COMMENT = "\n# one comment more\n"
MARKER = """
import os
with open({path!r}, "a") as marker:
    marker.write(os.environ.get("FLWR_HOME", "") + "\\n")
"""
"""Whoever imports the app leaves a line that says who it is: the server does so, too."""


def changed_app(folder: Path, added: str) -> Path:
    """A copy of the app, with lines at the end of its module."""
    shutil.copytree(BUNDLE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "deal_app.py").open("a") as module:
        module.write(added)
    return folder
