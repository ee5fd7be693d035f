"""``deal demo``: the commands of a consortium, one after another, on one machine. No process that
was started outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from deal_core.config.data import DataConfig, PartitionConfig
from deal_core.data import open_source
from deal_core.data.partition import partition
from deal_core.errors import UserError, at_home
from deal_core.installed import import_path
from server.folder import Listener, RunFolder, plain_reason
from simulations.deployment.keys import fingerprint_of_line
from simulations.deployment.service import filled
from simulations.engines import STOPPED, deferred, stoppable, uninterrupted
from simulations.engines.flower import LOCAL, Tail, answers, free_port, stop_all
from simulations.output import at_work, print_line, toml_value
from simulations.run.run_log import told_to

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
    """Start a server and two or three sites in a new folder of this machine, run an experiment to
    its end, stop all of it; ``write_page`` is called with the folder of the finished run.

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
        with stoppable("server and sites end"):
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
    server, port = folder / "server", free_port()
    with (
        at_work(console, "dividing questions among the sites") as say,
        Commands(folder, console) as deal,
    ):
        experiment = write_shares(folder, names)
        deal.call(
            *("server", "init", server, "--host", LOCAL, "--superlink-port", port),
            *("--port", free_port()),  # the proxy's, which stays unused
        )
        deal.start("server", "server", "start", server)
        say("waiting for the server")
        deal.wait_for("the server", lambda: answers(port), START_SECONDS)
        say("making and starting sites")
        for name in names:
            site = folder / "sites" / name
            deal.call(
                *("site", "init", site, "--name", name, "--data", folder / "data" / name),
                *("--server", f"{LOCAL}:{port}", "--certificate", server / "ca.crt"),
                *("--experiment", experiment),
            )
            deal.call("server", "add-site", name, site / "site.pub", "--dir", server)
        pins = _pins(folder, names)
        for name in names:
            site = folder / "sites" / name
            file = site / "site.toml"
            file.write_text(file.read_text("utf-8").partition("[policy]")[0] + pins, "utf-8")
            deal.start(name, "site", "start", site)
        deal.call("submit", experiment, "--dir", server)
        (run,) = (server / "runs").iterdir()
        tail, listener = Tail(RunFolder(run).metrics), told_to(console, say)
        say("waiting for the run to start")
        deal.wait_for("the end of the run", lambda: ended(tail, listener), RUN_SECONDS)
    return run


def _pins(folder: Path, names: Sequence[str]) -> str:
    """Return the end of each ``site.toml``: the sites' fingerprints, as if they had telephoned, and
    their policy."""
    lines = [(folder / "sites" / name / "site.pub").read_text("utf-8") for name in names]
    shown = zip(names, map(fingerprint_of_line, lines), strict=True)
    return "\n".join(["[peers]", *(f'"{name}" = "{each}"' for name, each in shown), "", POLICY])


def write_shares(folder: Path, names: Sequence[str]) -> Path:
    """Divide the training and test questions of both tasks among the sites, as CSV: every question
    is at one site, labels in other shares than elsewhere, as between hospitals.

    Returns:
        The file of an experiment with them.
    """
    import pandas as pd

    source = open_source(DataConfig(tasks=TASKS, max_train=TRAIN_ROWS, max_test=TEST_ROWS))
    tasks = [source.load(name) for name in TASKS]
    rule = PartitionConfig(kind="dirichlet", alpha=1.0)
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
    return experiment


class Commands:
    """``deal`` commands, each printed before it runs. What was started prints to ``NAME.out`` in
    the folder; all of it has ended at the end of the block, however that is left."""

    program: Sequence[str] = (sys.executable, "-P", "-m", "simulations.cli")

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder = folder
        self.console = console
        self.started: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {**os.environ, "PYTHONPATH": import_path(), MARK: str(folder)}

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, *raised: object) -> None:
        """Ask sites and then the server to end, wait, and end what is left, with all of theirs."""
        with uninterrupted():
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

    def _line(self, words: Sequence[object]) -> list[str]:
        below = f"{Path.cwd()}/"
        print_line(self.console, " ".join(["$ deal", *(str(w).removeprefix(below) for w in words)]))
        return [*self.program, *map(str, words)]

    def call(self, *words: object) -> None:
        """Run a command to its end. UserError: it has failed."""
        done = subprocess.run(
            self._line(words), env=self.environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise UserError(f"deal {words[0]}: {done.stderr.strip().removeprefix('error: ')}")

    def start(self, name: str, *words: object) -> None:
        """Start a command that goes on."""
        with deferred(), (self.folder / f"{name}.out").open("ab") as output:
            self.started[name] = subprocess.Popen(
                self._line(words),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal is for us alone
            )

    def wait_for(self, what: str, condition: Callable[[], bool], seconds: float) -> None:
        """Wait for a condition. UserError: it took longer, or a process has ended by itself."""
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
