"""``deal demo deployment``: the commands of a consortium, one after another, on one machine. All
processes that were started are known, and none outlives it. ``deal demo files`` writes what server
and sites need before they start: keys, shares of the embedded questions, and the experiment."""

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
from itertools import count
from pathlib import Path

import psutil
from rich.console import Console

from deal_core.config.data import DataConfig, PartitionConfig
from deal_core.data import TaskData, open_source, partition
from deal_core.errors import UserError, at_home
from server.folder import Listener, RunFolder, plain_reason
from simulations.deployment.programs import filled
from simulations.deployment.server.folder import (
    ServerFolder,
    ServerSettings,
    add_site,
    init_server,
)
from simulations.deployment.server.submit import flower_status, starts, submit
from simulations.deployment.site.folder import agreed_labels, init_site
from simulations.engines.flower import LOCAL, Tail, free_port, import_path, members, stop_all
from simulations.engines.interrupt import deferred, stoppable, uninterrupted
from simulations.output.console import print_line
from simulations.output.files import toml_value
from simulations.run.experiment import Request, load_experiment
from simulations.run.progress import progress_view
from simulations.run.simulate import STOPPED

NAMES = ("north", "south", "west")
"""Of the sites; a demonstration has the first two or all."""
DEFAULT = Path("runs") / "demo-deployment"
TASKS = ("laboratory", "surgery")
TRAIN_ROWS = 240
"""Of a task, all sites together."""
TEST_ROWS = 120
SEED = 0
POLICY = """\
# The embedded questions are public, so this demonstration is without privacy. What deal site init
# writes by itself asks for differential privacy, and lets no count of right answers leave.
metrics = "clear"
share_num_examples = true
share_sums = true
"""
MARK = "DEAL_DEMO"
"""In the environment of everything that is started: the folder. Processes inherit it, also those
that leave their group."""
STOP_SECONDS = 20.0
POLL_SECONDS = 0.2
START_SECONDS = 90.0
RUN_SECONDS = 1200.0
"""A machine that is busy with other things may take long; none takes longer than this."""
SILENT_SECONDS = 30.0
"""After so long without an event Flower is asked whether the run has failed."""
Shown = Callable[..., None]
"""Hears the words of a ``deal`` command that does the same."""


class DemoFolder:
    """Names inside it.

    Attributes:
        server: as of ``deal server init``.
        experiment: tasks, labels and rounds, which server and sites know.
        sites: a folder for each, as of ``deal site init``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.server = ServerFolder(path / "server")
        self.experiment = path / "two-tasks.toml"
        self.sites = path / "sites"

    def site(self, name: str) -> Path:
        """As of ``deal site init``."""
        return self.sites / name

    def data(self, name: str) -> Path:
        """What a site has: one folder per task."""
        return self.path / "data" / name

    def output(self, name: str) -> Path:
        """What ``deal server start`` or ``deal site start`` prints."""
        return self.path / f"{name}.out"


def new_folder(asked: str) -> DemoFolder:
    """Return a folder that is not there yet; without a wish the first free one below ``runs``.

    Raises:
        UserError: the wanted one is there already.
    """
    if asked:
        path = at_home(asked).resolve()
        if path.exists():
            raise UserError(f"--dir {asked}: is there already; choose a new folder")
        return DemoFolder(path)
    numbered = (DEFAULT.with_name(f"{DEFAULT.name}-{number}") for number in count(2))
    free = DEFAULT if not DEFAULT.exists() else next(each for each in numbered if not each.exists())
    return DemoFolder(free.resolve())


def write_files(path: Path, sites: int, port: int) -> list[str]:
    """Fill a folder.

    Args:
        path: of the demonstration.
        sites: two or three.
        port: of the SuperLink.

    Returns:
        The commands that start all of it.

    Raises:
        UserError: there is a server or a site already, or it cannot be written.
    """
    folder, names = DemoFolder(at_home(path).resolve()), NAMES[:sites]
    if folder.server.path.exists() or folder.sites.exists():
        raise UserError(f"{path}: holds a demonstration already; name a new folder")
    write_shares(folder, names)
    _write_server(folder, port, port - 1)
    _write_sites(folder, names, port)
    server = folder.server.path
    lines = [f"made {folder.path}; next:", f"  deal server start {server}"]
    for name in names:
        site = folder.site(name)
        lines += [
            f"  deal server add-site {name} {site / 'site.pub'} --dir {server}",
            f"  deal site start {site}",
        ]
    return [*lines, f"  deal submit {folder.experiment} --dir {server}"]


def _write_server(
    folder: DemoFolder, port: int, proxy: int, shown: Shown = lambda *words: None
) -> None:
    """Make certificates and settings of a server that is reached on this machine alone; nobody
    listens on the proxy's port."""
    shown("server init", folder.server.path, "--host", LOCAL, "--superlink-port", port)
    settings = ServerSettings(hosts=(LOCAL,), port=proxy, superlink_port=port)
    init_server(folder.server, settings)


def _write_sites(
    folder: DemoFolder, names: Sequence[str], port: int, shown: Shown = lambda *words: None
) -> None:
    """Make keys and ``site.toml`` of every site, for the tasks of the experiment."""
    labels = agreed_labels(load_experiment(Request(str(folder.experiment))))
    address, authority = f"{LOCAL}:{port}", folder.server.authority
    for name in names:
        site, data = folder.site(name), folder.data(name)
        shown(
            *("site init", site, "--name", name, "--data", data, "--server", address),
            *("--certificate", authority, "--experiment", folder.experiment),
        )
        init_site(site, data, name, address, authority, labels=labels, policy=POLICY)


def write_shares(folder: DemoFolder, names: Sequence[str]) -> None:
    """Divide the training and test questions of both tasks among the sites, as CSV, and write the
    experiment; every question is at one site, labels in other shares than elsewhere, as between
    hospitals.

    Args:
        folder: of the demonstration.
        names: of the sites.

    Raises:
        UserError: the embedded data are not installed, or the folder cannot be written.
    """
    import pandas as pd

    source = open_source(DataConfig(tasks=TASKS, max_train=TRAIN_ROWS, max_test=TEST_ROWS))
    tasks = [source.load(name) for name in TASKS]
    rule = PartitionConfig(kind="dirichlet", alpha=1.0)
    try:
        for task in tasks:
            for name, share in zip(names, partition(task, rule, len(names), SEED), strict=True):
                place = folder.data(name) / task.name
                place.mkdir(parents=True, exist_ok=True)
                for split, examples in (("train", share.train), ("test", share.test)):
                    rows = [{"text": each.text, "label": each.label} for each in examples]
                    table = pd.DataFrame(rows, columns=["text", "label"])
                    table.to_csv(place / f"{split}.csv", index=False)
        folder.experiment.write_text(_experiment(tasks, len(names)), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{folder.path}: cannot be written ({error.strerror}); name another folder"
        ) from None


def _experiment(tasks: Sequence[TaskData], sites: int) -> str:
    labels = "\n".join(f"{toml_value(task.name)} = {toml_value(task.labels)}" for task in tasks)
    threads = max(1, (os.cpu_count() or 1) // sites)
    return filled("two-tasks.toml", tasks=toml_value(list(TASKS)), labels=labels, threads=threads)


def demo_deployment(
    where: str, sites: int, console: Console, write_page: Callable[[Path], None]
) -> int:
    """Start a server and sites on this machine, run an experiment to its end, stop all of it.

    Args:
        where: a new folder; empty: chosen below ``runs``.
        sites: two or three.
        console: for people.
        write_page: called with the folder of the finished run.

    Returns:
        The exit code: 0; 130 where it was stopped.

    Raises:
        UserError: the folder is there already, or something did not start or did not finish;
            nothing runs any more.
    """
    started = time.monotonic()
    folder, names = new_folder(where), NAMES[:sites]
    try:
        with stoppable():
            run = _run(folder, names, console)
    except KeyboardInterrupt:
        print_line(console, f"stopped; nothing of it runs any more; {folder.path} may be removed")
        return STOPPED
    from simulations.run.summary import print_report

    print_report(console, run)
    write_page(run)
    seconds = time.monotonic() - started
    print_line(console, f"took {seconds:.0f} s; server and sites have ended, no process is left")
    print_line(console, f'next: deal predict {brief(run)} "a broken bone"')
    print_line(console, f"what server and sites have written is in {brief(folder.path)}")
    return 0


def brief(word: object) -> str:
    """Return a word of a command; a path below the working directory without it."""
    here = Path.cwd()
    if isinstance(word, Path) and word.is_relative_to(here):
        return str(word.relative_to(here))
    return str(word)


def _run(folder: DemoFolder, names: Sequence[str], console: Console) -> Path:
    """Return the folder of the finished run; every process has ended."""

    def shown(*words: object) -> None:
        print_line(console, "$ deal " + " ".join(map(brief, words)))

    with console.status("dividing the embedded questions among the sites"):
        write_shares(folder, names)
    port, unused = free_port(), free_port()
    server = folder.server
    _write_server(folder, port, unused, shown)
    with stopped_at_the_end(Children(folder)) as children:
        shown("server start", server.path)
        children.start("server", "server", "start", str(server.path))
        _write_sites(folder, names, port, shown)
        with console.status("waiting for the server"):
            children.wait_for("the server", lambda: _answers(port), START_SECONDS)
        for name in names:
            shown("server add-site", name, folder.site(name) / "site.pub", "--dir", server.path)
            add_site(server, name, folder.site(name) / "site.pub")
            shown("site start", folder.site(name))
            children.start(name, "site", "start", str(folder.site(name)))
        shown("submit", folder.experiment, "--dir", server.path)
        submit(server, str(folder.experiment))
        run = next(path for path in server.runs.iterdir() if path.is_dir())
        with progress_view(console, "demo") as listener:
            follow(children, run, listener)
    return run


def follow(children: Children, run: Path, listener: Listener, seconds: float = RUN_SECONDS) -> None:
    """Hand every event of the run to the listener, until it has finished.

    Raises:
        UserError: the run stops, a process ends by itself, or it takes longer than ``seconds``.
    """
    tail, begun = Tail(RunFolder(run).metrics), time.monotonic()
    heard = begun
    while True:
        for event in tail.new():
            heard = time.monotonic()
            listener(event)
            if event["event"] == "run_finished":
                return
            if event["event"] == "run_stopped":
                raise UserError(
                    f"the run stopped: {plain_reason(event['reason'])} (its folder: {run})"
                )
        children.require_alive()
        if time.monotonic() > begun + seconds:
            raise UserError(f"the run has not finished within {seconds:g} s (its folder: {run})")
        if time.monotonic() > heard + SILENT_SECONDS:
            heard, begun_runs = time.monotonic(), starts(run)
            server = children.folder.server
            said = flower_status(server, begun_runs[-1]["run"]) if begun_runs else ""
            if said.startswith("finished"):  # and the run could not say so
                raise UserError(f"the run has ended as '{said}'; see {server.log}")
        time.sleep(POLL_SECONDS)


def _answers(port: int) -> bool:
    try:
        with socket.create_connection((LOCAL, port), timeout=1):
            return True
    except OSError:
        return False


@dataclass
class Children:
    """What was started here.

    Attributes:
        folder: of the demonstration.
        program: what is started, arguments follow.
        patience: seconds between the wish that they end and the end.
        started: name to process.
    """

    folder: DemoFolder
    program: Sequence[str] = (sys.executable, "-P", "-m", "simulations.cli")
    patience: float = STOP_SECONDS
    started: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, *arguments: str) -> None:
        """Start ``deal ARGUMENTS``; what it prints goes to the folder."""
        environment = {**os.environ, "PYTHONPATH": import_path(), MARK: str(self.folder.path)}
        with deferred(), self.folder.output(name).open("ab") as output:
            self.started[name] = subprocess.Popen(
                [*self.program, *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal is for us alone
            )

    def require_alive(self) -> None:
        """Raise :class:`UserError` where one has ended by itself."""
        for name, process in self.started.items():
            if process.poll() is not None:
                output = self.folder.output(name)
                said = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                last = said[-1] if said else "it said nothing"
                raise UserError(f"'{name}' has ended by itself: {last} (log: {output})")

    def wait_for(self, what: str, condition: Callable[[], bool], seconds: float) -> None:
        """Wait until the condition holds.

        Raises:
            UserError: it does not in that time, or a process has ended by itself.
        """
        end = time.monotonic() + seconds
        while not condition():
            self.require_alive()
            if time.monotonic() > end:
                raise UserError(f"{what}: not within {seconds:g} s; logs are in {self.folder.path}")
            time.sleep(POLL_SECONDS)

    def alive(self) -> list[psutil.Process]:
        """Return all processes that carry the mark: those started here, and those they started."""
        return members(self.folder.path, MARK)

    def stop(self) -> None:
        """Ask sites and then the server to end, wait, and end what is left.

        Raises:
            UserError: something runs even then.
        """
        for process in reversed(self.started.values()):
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        end = time.monotonic() + self.patience
        while self.alive() and time.monotonic() < end:
            for process in self.started.values():
                process.poll()
            time.sleep(POLL_SECONDS)
        stop_all(self.folder.path, MARK)
        for process in self.started.values():
            process.wait()
        if left := self.alive():
            numbers = ", ".join(str(process.pid) for process in left)
            raise UserError(f"still running: {numbers}; end them with kill -9")


@contextmanager
def stopped_at_the_end(children: Children) -> Iterator[Children]:
    """Yield what starts processes; at the end of the block, however it is left, all are stopped."""
    try:
        yield children
    finally:
        with uninterrupted():
            children.stop()
