"""``deal study``: runs what is left of a grid, a process for each run and several at a time, and
shows what it found in 80 columns."""

import os
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError, at_home
from deal_core.installed import import_path
from server.folder import RunFolder
from server.results import read_results
from simulations.engines import STOPPED, deferred, stoppable, uninterrupted
from simulations.engines.worker_pool import gpus_here, shown_gpu
from simulations.output import Table, at_work, print_line, print_table, require_one_kind
from simulations.run.simulate import RECORD, check_same, claimed, recorded
from simulations.study import tables
from simulations.study.grid import Study, chosen, grid, load_study, precise
from simulations.study.results import STUDY_JSON, StudyResults, finished, require_kept, write_study

SHOWN = ("arm", "n", tables.TASK_IL, tables.CLASS_IL, "backward transfer", "forgetting")
"""Columns; the report has the others."""
TITLE = "Means with 95 % intervals; accuracies in %, transfer and forgetting in points"
INPUTS = {"data", "stream", "federation", "model", "adapter"}
"""Tables of an experiment that say what is read and built."""
FAILED = 1
"""Exit code of a study in which a run failed."""
LOG = "log.txt"
"""What the process of a run said, in the run's folder."""
POLL_SECONDS = 0.2
PATIENCE_SECONDS = 30.0
"""For a process that was asked to stop."""


def run_study(
    name: str,
    console: Console,
    *,
    out: str = "",
    overrides: Sequence[str] = (),
    seeds: str = "",
    epsilon: str = "",
    only: str = "",
    jobs: int = 0,
) -> int:
    """Run what is left of a study, or of an experiment as the only arm of one; the help of the
    command says what its options are.

    Returns:
        The exit code: 0; 1 where a run failed; 130 where it was stopped.

    Raises:
        UserError: bad input, or a folder with other settings; nothing has started.
    """
    study = load_study(name, tuple(numbers(seeds)), epsilon)
    folder = study_folder(name, out)
    require_one_kind(folder, STUDY_JSON)
    cells = grid(study, folder, overrides)
    now = {cell.name for cell in chosen(cells, words(only))}
    left = {}
    for cell in cells:  # of any: a folder that holds a run with other settings is refused
        for part, experiment in cell.runs.items():
            if run_status(experiment) != "finished" and cell.name in now:
                left[f"{cell.name}/{part}".rstrip("/")] = experiment
    require_kept(folder)
    if left:
        check_left(left, console)
    results = write_study(study, folder, cells)
    failures: dict[str, str] = {}
    if left:
        at_once = jobs or fitting(list(left.values()), os.cpu_count() or 1, gpus_here())
        print_line(console, f"{len(left)} runs left, {at_once} at a time, in {folder}")
        try:
            failures = run_left(left, at_once, lambda: write_study(study, folder, cells), console)
        except KeyboardInterrupt:
            print_line(console, f"stopped; continue with\n  {shlex.join(['deal', *sys.argv[1:]])}")
            return STOPPED
        results = write_study(study, folder, cells)
    print_summary(console, study, results)
    told = {each.name for each in results.cells}
    for cell in cells:
        if cell.name not in told and finished(cell):
            print_line(console, f"left out: {cell.name}: its clients kept their counts")
    print_line(console, f"figures in {folder / STUDY_JSON}")
    for run, why in failures.items():
        print_line(console, f"failed: {run}: {why}")
    return FAILED if failures else 0


def print_summary(console: Console, study: Study, results: StudyResults) -> None:
    """Print the measures of every arm; under several settings, the best setting of each arm.
    Nothing where no cell is done."""
    if not results.cells:
        return
    if study.file.epsilons:
        for arm, own in tables.by_arm(study, results.cells).items():
            print_table(console, tables.budget_table(study, arm, own))
            for meaning in tables.meanings(own):
                print_line(console, meaning)
    elif len(study.file.settings) > 1:
        print_table(console, tables.setting_tables(study, results.cells)[0])
    else:
        table = tables.arms_table(study, results.cells)
        places = [i for i, name in enumerate(table.columns) if name in SHOWN]
        columns, *rows = (tuple(row[i] for i in places) for row in (table.columns, *table.rows))
        best = frozenset((y, places.index(x)) for y, x in table.best if x in places)
        print_table(console, Table(TITLE, columns, tuple(rows), best=best))
    if texts := tables.mixed_measures(results.cells):
        print_line(console, texts)


def study_folder(name: str, out: str = "") -> Path:
    """Return the folder of a study."""
    return at_home(out or f"runs/study-{Path(name).stem}").resolve()


def check_left(left: dict[str, Experiment], console: Console) -> None:
    """Raise UserError of a mistake in the names, in what is read and built, or in what is told."""
    with at_work(console, "checking the study and its data"):
        from simulations.run.check import preflight
        from simulations.run.model_checks import check_names

        inputs = dict[tuple[str, ...], Experiment]()
        for each in left.values():
            check_names(each)
            if each.privacy.metrics == "none":
                raise UserError(
                    'privacy.metrics = "none": without counts there is no accuracy to compare; '
                    'use "clear"; with aggregation.secure also "summed"'
                )
            read = each.model_dump_json(include=INPUTS)
            inputs[read, each.privacy.unit_column, str(each.run.seed)] = each
        for experiment in inputs.values():
            preflight(experiment)


def run_left(
    left: Mapping[str, Experiment], jobs: int, renew: Callable[[], object], console: Console
) -> dict[str, str]:
    """Run what is left, in its order, ``jobs`` at a time, each of several GPUs for one of them; one
    that fails stops no other. ``renew`` writes the figures after every run that finished.
    Interrupted, it stops what is at work (each leaves its checkpoint) before it returns.

    Returns:
        Run and reason of every failure.
    """
    waiting, places, gpus = deque(left), dict[str, int](), gpus_here()
    working: dict[str, subprocess.Popen[bytes]] = {}
    failures: dict[str, str] = {}

    def ended(name: str, why: str) -> None:
        try:
            if not why:
                renew()
        except UserError as error:  # it stops no other run
            why = str(error)
        if why:
            failures[name] = why
        done = len(left) - len(waiting) - len(working)
        how = f"failed: {why}" if why else "finished"
        print_line(console, f"{done}/{len(left)} {name} {how}")

    stops = stoppable("the runs at work stop with their checkpoints")
    with at_work(console, "starting") as say, stops:
        try:
            while waiting or working:
                while waiting and len(working) < jobs:
                    name = waiting.popleft()
                    places[name] = min(set(range(jobs)) - {places[each] for each in working})
                    try:
                        with deferred():
                            working[name] = start(left[name], shown_gpu(places[name], gpus))
                    except UserError as error:
                        ended(name, str(error))
                say(f"{len(waiting)} waiting; at work: {', '.join(working)}")
                time.sleep(POLL_SECONDS)
                for name in [name for name, run in working.items() if run.poll() is not None]:
                    code = working.pop(name).returncode
                    ended(name, "" if code == 0 else reason(Path(left[name].run.out), code))
        finally:
            with uninterrupted():
                stop(list(working.values()))
    return failures


def run_status(experiment: Experiment) -> Literal["new", "started", "finished"]:
    """Return how far a run in its folder has come. UserError: it has other settings."""
    folder = RunFolder(Path(experiment.run.out))
    cure = "set it back, remove that folder, or choose another --out"
    if folder.results.exists():
        check_same(experiment, read_results(folder.path).config, "study", cure)
        return "finished"
    if folder.can_resume:
        check_same(experiment, recorded(folder.path), "study", cure)
        return "started"
    return "new"


def start(experiment: Experiment, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Return ``deal simulate`` on the experiment, started: this very code, in a process of its own
    that Ctrl-C at the terminal does not reach; a run that was stopped continues."""
    folder = Path(experiment.run.out)
    resume = run_status(experiment) == "started"
    run = experiment.run.model_copy(update={"resume": resume})
    wanted = experiment if resume else precise(experiment)
    with claimed(wanted.model_copy(update={"run": run})):
        pass  # written where no other process is at work; the run claims it for itself
    command = [sys.executable, "-P", "-m", "simulations.cli", "simulate", str(folder / RECORD)]
    command += ["--out", str(folder), *(["--resume"] if resume else [])]
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment, "PYTHONPATH": import_path()},
            start_new_session=True,
        )


def reason(folder: Path, code: int) -> str:
    """Return why a run failed, on one line: its last words, and where the rest is."""
    log = folder / LOG
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    said = lines[-1].strip().removeprefix("error: ") if lines else "it said nothing"
    killed = f"killed by signal {-code}; " if code < 0 else ""
    return f"{killed}{said} (see {log})"


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask processes to stop, and end those that do not."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + PATIENCE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def fitting(runs: Sequence[Experiment], cores: int, gpus: int) -> int:
    """Return the runs at a time for which there are cores, and GPUs where there are some."""
    widest = max(run.run.threads * run.run.workers for run in runs)
    return max(1, min(cores // widest, gpus or cores))


def numbers(text: str) -> list[int]:
    """Return the whole numbers of a text like ``0,1,2``. UserError: some are none."""
    try:
        return [int(word) for word in words(text)]
    except ValueError:
        raise UserError(f"--seeds {text}: write whole numbers, e.g. --seeds 0,1") from None


def words(text: str) -> list[str]:
    """Return the words of a text like ``a,b``."""
    return [word.strip() for word in text.split(",") if word.strip()]
