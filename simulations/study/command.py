"""``deal study``: runs what is left of a grid, and shows what it found in 80 columns."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError, at_home
from simulations.engines.interrupt import stoppable
from simulations.engines.worker_pool import gpus_here
from simulations.output.console import NARROW, print_line, require_one_kind, text_table
from simulations.output.files import TextTable, write_texts
from simulations.run.simulate import STOPPED
from simulations.study.budgets import budget_table, meanings
from simulations.study.grid import Cell, chosen, default_settings, grid
from simulations.study.results import (
    STUDY_JSON,
    StudyResults,
    collect,
    finished,
    require_kept,
    require_same_rows,
)
from simulations.study.runs import run_all, run_status
from simulations.study.study_file import Study, load_study
from simulations.study.tables import CLASS_IL, TASK_IL, arms_table, best_settings, by_arm

SHOWN = ("arm", "n", TASK_IL, CLASS_IL, "backward transfer", "forgetting")
"""Columns; the report has the others."""
TITLE = "Means with 95 % intervals; accuracies in %, transfer and forgetting in points"
INPUTS = {"data", "stream", "federation", "model", "adapter"}
"""Tables of an experiment that say what is read and built."""
FAILED = 1
"""Exit code of a study in which a run failed."""


@dataclass(frozen=True)
class StudyRequest:
    """The arguments of ``deal study``."""

    study: str
    """A shipped name or the path of a TOML file, of a study or an experiment."""
    out: str = ""
    """Folder of the study; empty: ``runs/study-NAME``."""
    overrides: tuple[str, ...] = ()
    """``table.key=value``, for all cells."""
    seeds: str = ""
    """Separated by commas; empty: the study's."""
    epsilon: str = ""
    """Budgets, separated by commas; empty: the study's."""
    only: str = ""
    """Names of cells, or parts or patterns of them, that are run now; empty: all."""
    jobs: int = 0
    """Runs at a time; 0: as many as there are cores for."""


def run_study(request: StudyRequest, console: Console) -> int:
    """Run what is left of a study.

    Returns:
        The exit code: 0; 1 where a run failed; 130 where it was stopped.

    Raises:
        UserError: bad input, or a folder with other settings; nothing has started.
    """
    study = load_study(request.study, tuple(numbers(request.seeds)), request.epsilon)
    out = study_folder(request)
    require_one_kind(out, STUDY_JSON)
    cells = grid(study, out, request.overrides)
    left = remaining(cells, chosen(cells, names(request.only)))
    require_kept(out)
    if left:
        check_left(left, console)
    results = write(study, out, cells)
    failures: dict[str, str] = {}
    if left:
        try:
            failures = run_left(left, request, lambda: write(study, out, cells), console)
        except KeyboardInterrupt:
            return STOPPED
        results = write(study, out, cells)
    print_summary(console, study, results)
    told = {each.name for each in results.cells}
    for cell in cells:
        if cell.name not in told and finished(cell):
            print_line(console, f"left out: {cell.name}: its clients kept their counts")
    print_line(console, f"figures in {out / STUDY_JSON}")
    for name, why in failures.items():
        print_line(console, f"failed: {name}: {why}")
    return FAILED if failures else 0


def print_summary(console: Console, study: Study, results: StudyResults) -> None:
    """Print the measures of every arm; under several settings, the best setting of each arm.
    Nothing where no cell is done."""

    def show(table: TextTable, title: str) -> None:
        console.print(text_table(table, title), width=min(NARROW, console.width))

    if not results.cells:
        return
    if study.file.epsilons:
        for arm, own in by_arm(study, results.cells).items():
            show(budget_table(study, own), study.label(arm))
            for meaning in meanings(own):
                print_line(console, meaning)
    elif len(study.file.settings) > 1:
        show(best_settings(study, results.cells), TITLE)
    else:
        table = arms_table(study, results.cells)
        places = [i for i, name in enumerate(table.columns) if name in SHOWN]
        rows = tuple(tuple(row[i] for i in places) for row in table.rows)
        columns = tuple(table.columns[i] for i in places)
        show(TextTable(columns, tuple(table.right[i] for i in places), rows), TITLE)


def study_folder(request: StudyRequest) -> Path:
    """Return the folder of a study."""
    return at_home(request.out or f"runs/study-{Path(request.study).stem}").resolve()


def remaining(cells: Sequence[Cell], wanted: Sequence[Cell]) -> dict[str, Experiment]:
    """Return name to every run of the wanted cells that has not finished.

    Raises:
        UserError: a folder, of any cell, holds a run with other settings.
    """
    left = {}
    now = {cell.name for cell in wanted}
    for cell in cells:
        for part, experiment in cell.runs.items():
            if run_status(experiment) != "finished" and cell.name in now:
                left[f"{cell.name}/{part}".rstrip("/")] = experiment
    return left


def check_left(left: dict[str, Experiment], console: Console) -> None:
    """Check before anything starts all names, and what cells differ in of data and model, once
    each.

    Raises:
        UserError: a mistake in the input, or accuracies that clients would keep.
    """
    with console.status("checking the study and its data"):
        from simulations.run.check import preflight
        from simulations.run.preflight import check_names

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
    left: dict[str, Experiment],
    request: StudyRequest,
    renew: Callable[[], object],
    console: Console,
) -> dict[str, str]:
    """Run what is left.

    Args:
        left: name to run; none of them finished.
        request: how many at a time, and how the command is repeated.
        renew: called after every run that finished; writes the figures.
        console: for progress.

    Returns:
        Run and reason of every failure.

    Raises:
        KeyboardInterrupt: it was stopped; the command that continues is printed.
    """
    failures: dict[str, str] = {}
    done: list[str] = []
    working: list[str] = []
    jobs = request.jobs or fitting(list(left.values()), os.cpu_count() or 1, gpus_here())
    print_line(console, f"{len(left)} runs left, {jobs} at a time, in {study_folder(request)}")
    with console.status("starting") as status:

        def show() -> None:
            waiting = len(left) - len(done) - len(working)
            status.update(f"{len(done)} done, {waiting} waiting; at work: {', '.join(working)}")

        def started(name: str) -> None:
            working.append(name)
            show()

        def ended(name: str, why: str) -> None:
            working.remove(name)
            done.append(name)
            show()
            if not why:
                try:
                    renew()
                except UserError as error:  # it stops no other run
                    why = str(error)
            if why:
                failures[name] = why
            how = f"failed: {why}" if why else "finished"
            print_line(console, f"{len(done)}/{len(left)} {name} {how}")

        try:
            with stoppable():
                run_all(left, jobs, started, ended)
        except KeyboardInterrupt:
            print_line(console, f"stopped; {len(done)} of {len(left)} runs ended; continue with")
            print_line(console, f"  {shlex.join(command(request))}")
            raise
    return failures


def write(study: Study, out: Path, cells: Sequence[Cell]) -> StudyResults:
    """Return what has finished, written as ``study.json``.

    Raises:
        UserError: the folder cannot be written, or cells were found on different rows.
    """
    results = StudyResults(
        study=study.name,
        description=study.file.description,
        wanted=len(cells),
        defaults=default_settings(),
        cells=collect(cells),
        file=study.file,
    )
    require_same_rows(results.cells)
    write_texts(out, {STUDY_JSON: results.model_dump_json(indent=1) + "\n"})
    return results


def fitting(runs: Sequence[Experiment], cores: int, gpus: int) -> int:
    """Return the runs at a time for which there are cores, and GPUs where there are some."""
    widest = max(run.run.threads * run.run.workers for run in runs)
    return max(1, min(cores // widest, gpus or cores))


def command(request: StudyRequest) -> list[str]:
    """Return the command again: it goes on where it was stopped."""
    words = ["deal", "study", request.study]
    for option in ("out", "seeds", "epsilon", "only", "jobs"):
        if value := getattr(request, option):
            words += [f"--{option}", str(value)]
    for override in request.overrides:
        words += ["--set", override]
    return words


def numbers(text: str) -> list[int]:
    """Return the whole numbers of a text like ``0,1,2``.

    Raises:
        UserError: something in it is no number.
    """
    try:
        return [int(word) for word in names(text)]
    except ValueError:
        raise UserError(f"--seeds {text}: write whole numbers, e.g. --seeds 0,1") from None


def names(text: str) -> list[str]:
    """Return the words of a text like ``a,b``."""
    return [word.strip() for word in text.split(",") if word.strip()]
