"""``deal study``: runs what is left of a grid, and shows what it found in 80 columns."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError, at_home
from simulations.engines import STOPPED, stoppable
from simulations.engines.worker_pool import gpus_here
from simulations.output import Table, print_line, print_table, require_one_kind, write_texts
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
from simulations.study.tables import (
    CLASS_IL,
    TASK_IL,
    arms_table,
    by_arm,
    mixed_measures,
    setting_tables,
)

SHOWN = ("arm", "n", TASK_IL, CLASS_IL, "backward transfer", "forgetting")
"""Columns; the report has the others."""
TITLE = "Means with 95 % intervals; accuracies in %, transfer and forgetting in points"
INPUTS = {"data", "stream", "federation", "model", "adapter"}
"""Tables of an experiment that say what is read and built."""
FAILED = 1
"""Exit code of a study in which a run failed."""


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
    """Run what is left of a study.

    Args:
        name: a shipped name or the path of a TOML file, of a study or an experiment.
        console: for people.
        out: folder of the study; empty: ``runs/study-NAME``.
        overrides: ``table.key=value``, for all cells.
        seeds: separated by commas; empty: the study's.
        epsilon: budgets, separated by commas; empty: the study's.
        only: names of cells, or parts or patterns of them, that are run now; empty: all.
        jobs: runs at a time; 0: as many as there are cores for.

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
    results = write(study, folder, cells)
    failures: dict[str, str] = {}
    if left:
        at_once = jobs or fitting(list(left.values()), os.cpu_count() or 1, gpus_here())
        print_line(console, f"{len(left)} runs left, {at_once} at a time, in {folder}")
        try:
            failures = run_left(left, at_once, lambda: write(study, folder, cells), console)
        except KeyboardInterrupt:
            print_line(console, f"stopped; continue with\n  {shlex.join(['deal', *sys.argv[1:]])}")
            return STOPPED
        results = write(study, folder, cells)
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
        for arm, own in by_arm(study, results.cells).items():
            print_table(console, budget_table(study, study.label(arm), own))
            for meaning in meanings(own):
                print_line(console, meaning)
    elif len(study.file.settings) > 1:
        print_table(console, setting_tables(study, results.cells)[0])
    else:
        table = arms_table(study, results.cells)
        places = [i for i, name in enumerate(table.columns) if name in SHOWN]
        columns, *rows = (tuple(row[i] for i in places) for row in (table.columns, *table.rows))
        best = frozenset((y, places.index(x)) for y, x in table.best if x in places)
        print_table(console, Table(TITLE, columns, tuple(rows), best=best))
    if texts := mixed_measures(results.cells):
        print_line(console, texts)


def study_folder(name: str, out: str = "") -> Path:
    """Return the folder of a study."""
    return at_home(out or f"runs/study-{Path(name).stem}").resolve()


def check_left(left: dict[str, Experiment], console: Console) -> None:
    """Check before anything starts all names, and what cells differ in of data and model, once
    each.

    Raises:
        UserError: a mistake in the input, or accuracies that clients would keep.
    """
    with console.status("checking the study and its data"):
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
    left: dict[str, Experiment], jobs: int, renew: Callable[[], object], console: Console
) -> dict[str, str]:
    """Run what is left, ``jobs`` at a time; ``renew`` writes the figures after every run that
    finished.

    Returns:
        Run and reason of every failure.
    """
    failures: dict[str, str] = {}
    working: list[str] = []
    done = 0
    with console.status("starting") as status:

        def show() -> None:
            waiting = len(left) - done - len(working)
            status.update(f"{done} done, {waiting} waiting; at work: {', '.join(working)}")

        def started(name: str) -> None:
            working.append(name)
            show()

        def ended(name: str, why: str) -> None:
            nonlocal done
            working.remove(name)
            done += 1
            show()
            try:
                if not why:
                    renew()
            except UserError as error:  # it stops no other run
                why = str(error)
            if why:
                failures[name] = why
            how = f"failed: {why}" if why else "finished"
            print_line(console, f"{done}/{len(left)} {name} {how}")

        with stoppable("the runs at work stop with their checkpoints"):
            run_all(left, jobs, started, ended)
    return failures


def write(study: Study, out: Path, cells: Sequence[Cell]) -> StudyResults:
    """Return what has finished, written as ``study.json``. UserError: on different rows."""
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


def numbers(text: str) -> list[int]:
    """Return the whole numbers of a text like ``0,1,2``. UserError: some are none."""
    try:
        return [int(word) for word in words(text)]
    except ValueError:
        raise UserError(f"--seeds {text}: write whole numbers, e.g. --seeds 0,1") from None


def words(text: str) -> list[str]:
    """Return the words of a text like ``a,b``."""
    return [word.strip() for word in text.split(",") if word.strip()]
