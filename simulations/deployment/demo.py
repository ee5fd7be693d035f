"""``deal demo``: the commands of a consortium, one after another, on one machine. No process that
was started outlives it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from deal_core.config.data import DataConfig, PartitionConfig
from deal_core.data import open_source, partition
from deal_core.errors import UserError, at_home
from server.folder import Listener, RunFolder, plain_reason
from simulations.deployment.server.folder import (
    ServerFolder,
    ServerSettings,
    add_site,
    init_server,
)
from simulations.deployment.server.submit import submit
from simulations.deployment.service import filled
from simulations.deployment.site.folder import agreed_labels, init_site
from simulations.engines.flower import LOCAL, Tail, free_port, import_path, stop_all
from simulations.engines.interrupt import deferred, stoppable, uninterrupted
from simulations.output.console import print_line
from simulations.output.files import toml_value
from simulations.run.experiment import Request, load_experiment
from simulations.run.progress import told_to
from simulations.run.simulate import STOPPED

NAMES = ("north", "south", "west")
"""Of the sites; a demonstration has the first two or all."""
TASKS = ("laboratory", "surgery")
TRAIN_ROWS = 240
"""Of a task, all sites together."""
TEST_ROWS = 120
SEED = 0
POLICY = """\
[policy]
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


def run_demo(where: str, sites: int, console: Console, write_page: Callable[[Path], None]) -> int:
    """Start a server and sites on this machine, run an experiment to its end, stop all of it.

    Args:
        where: a new folder.
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
    folder = at_home(where).resolve()
    if folder.exists():
        raise UserError(f"--dir {where}: is there already; choose a new folder")
    try:
        with stoppable():
            run = _run(folder, NAMES[:sites], console)
    except KeyboardInterrupt:
        print_line(console, f"stopped; nothing of it runs any more; {folder} may be removed")
        return STOPPED
    from simulations.run.summary import print_report

    print_report(console, run)
    write_page(run)
    seconds = time.monotonic() - started
    print_line(console, f"took {seconds:.0f} s; server and sites have ended, no process is left")
    print_line(console, f'next: deal predict {run} "a broken bone"')
    print_line(console, f"what server and sites have written is in {folder}")
    return 0


def _run(folder: Path, names: Sequence[str], console: Console) -> Path:
    """Return the folder of the finished run; every process has ended."""

    def shown(*words: object) -> None:
        below = f"{Path.cwd()}/"
        print_line(console, " ".join(["$ deal", *(str(w).removeprefix(below) for w in words)]))

    with console.status("dividing the embedded questions among the sites"):
        experiment = write_shares(folder, names)
    labels = agreed_labels(load_experiment(Request(str(experiment))))
    server, port = ServerFolder(folder / "server"), free_port()
    shown("server init", server.path, "--host", LOCAL, "--superlink-port", port)
    settings = ServerSettings(hosts=(LOCAL,), port=free_port(), superlink_port=port)
    init_server(server, settings)  # the proxy's port stays unused
    with stopped_at_the_end(Children(folder)) as children:
        shown("server start", server.path)
        children.start("server", "server", "start", str(server.path))
        with console.status("waiting for the server"):
            children.wait_for("the server", lambda: _answers(port), START_SECONDS)
        for name in names:
            site, data, address = folder / "sites" / name, folder / "data" / name, f"{LOCAL}:{port}"
            shown(
                *("site init", site, "--name", name, "--data", data, "--server", address),
                *("--certificate", server.authority, "--experiment", experiment),
            )
            init_site(site, data, name, address, server.authority, labels)
            written = site / "site.toml"
            written.write_text(
                written.read_text("utf-8").partition("[policy]")[0] + POLICY, "utf-8"
            )
            shown("server add-site", name, site / "site.pub", "--dir", server.path)
            add_site(server, name, site / "site.pub")
            shown("site start", site)
            children.start(name, "site", "start", str(site))
        shown("submit", experiment, "--dir", server.path)
        submit(server, str(experiment))
        (run,) = server.runs.iterdir()
        tail, listener = Tail(RunFolder(run).metrics), told_to(console)
        children.wait_for("the end of the run", lambda: ended(tail, listener), RUN_SECONDS)
    return run


def write_shares(folder: Path, names: Sequence[str]) -> Path:
    """Divide the training and test questions of both tasks among the sites, as CSV: every question
    is at one site, labels in other shares than elsewhere, as between hospitals.

    Returns:
        The file of an experiment with them.

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
                place = folder / "data" / name / task.name
                place.mkdir(parents=True, exist_ok=True)
                for split, examples in (("train", share.train), ("test", share.test)):
                    rows = [{"text": each.text, "label": each.label} for each in examples]
                    table = pd.DataFrame(rows, columns=["text", "label"])
                    table.to_csv(place / f"{split}.csv", index=False)
        labels = "\n".join(f"{toml_value(t.name)} = {toml_value(t.labels)}" for t in tasks)
        threads = max(1, (os.cpu_count() or 1) // len(names))
        words = {"tasks": toml_value(list(TASKS)), "labels": labels, "threads": threads}
        experiment = folder / "two-tasks.toml"
        experiment.write_text(filled("two-tasks.toml", **words), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); name another folder"
        ) from None
    return experiment


class Children:
    """What was started here, by name; each prints to ``NAME.out`` in the folder."""

    program: Sequence[str] = (sys.executable, "-P", "-m", "simulations.cli")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *arguments: str) -> None:
        """Start ``deal ARGUMENTS``."""
        environment = {**os.environ, "PYTHONPATH": import_path(), MARK: str(self.folder)}
        with deferred(), (self.folder / f"{name}.out").open("ab") as output:
            self.started[name] = subprocess.Popen(
                [*self.program, *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal is for us alone
            )

    def wait_for(self, what: str, condition: Callable[[], bool], seconds: float) -> None:
        """Wait until the condition holds.

        Raises:
            UserError: it does not in that time, or a process has ended by itself.
        """
        end = time.monotonic() + seconds
        while not condition():
            for name, process in self.started.items():
                if process.poll() is not None:
                    output = self.folder / f"{name}.out"
                    said = output.read_text("utf-8", errors="replace").strip().splitlines()
                    last = said[-1] if said else "it said nothing"
                    raise UserError(f"'{name}' has ended by itself: {last} (log: {output})")
            if time.monotonic() > end:
                raise UserError(f"{what}: not within {seconds:g} s; logs are in {self.folder}")
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        """Ask sites and then the server to end, wait, and end what is left, with all of theirs."""
        for process in reversed(self.started.values()):
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        end = time.monotonic() + STOP_SECONDS
        for process in self.started.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
        stop_all(self.folder, MARK)
        for process in self.started.values():
            process.wait()


@contextmanager
def stopped_at_the_end(children: Children) -> Iterator[Children]:
    """Yield what starts processes; at the end of the block, however it is left, all are stopped."""
    try:
        yield children
    finally:
        with uninterrupted():
            children.stop()


def ended(tail: Tail, listener: Listener) -> bool:
    """Hand the listener what is new of a run; whether it has finished. UserError: it stopped."""
    for event in tail.new():
        listener(event)
        if event["event"] == "run_stopped":
            reason = plain_reason(event["reason"])
            raise UserError(f"the run stopped: {reason} (its folder: {tail.path.parent})")
        if event["event"] == "run_finished":
            return True
    return False


def _answers(port: int) -> bool:
    try:
        with socket.create_connection((LOCAL, port), timeout=1):
            return True
    except OSError:
        return False
