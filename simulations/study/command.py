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
from simulations.output.files import TextTable, blocks, write_texts
from simulations.run.simulate import STOPPED
from simulations.study.budgets import budget_table
from simulations.study.grid import Cell, chosen, default_settings, grid
from simulations.study.page import markdown
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
    ALL_LABELS,
    AVERAGE_ACCURACY,
    arms_table,
    best_settings,
    by_arm,
)

SHOWN = ("arm", "n", AVERAGE_ACCURACY, ALL_LABELS, "backward transfer", "forgetting")
"""Columns; ``study.md`` has the others."""
TITLE = "Means with 95 % intervals; accuracies in %, transfer and forgetting in points"


def print_summary(console: Console, study: Study, results: StudyResults) -> None:
    """Print the measures of every arm; under several settings, the best setting of each arm.
    Nothing where no cell is done."""
    if not results.cells:
        return
    if study.file.epsilons:
        for arm, own in by_arm(study, results.cells).items():
            table = first_table(list(budget_table(study, own)))
            console.print(text_table(table, study.label(arm)), width=min(NARROW, console.width))
        return
    if len(study.file.settings) > 1:
        table = first_table(list(best_settings(study, results.cells)))
    else:
        table = narrowed(first_table(list(arms_table(study, results.cells))))
    console.print(text_table(table, TITLE), width=min(NARROW, console.width))


def first_table(lines: list[str]) -> TextTable:
    """Return the first table of a page.

    Raises:
        StopIteration: there is none.
    """
    return next(block for block in blocks(lines) if isinstance(block, TextTable))


def narrowed(table: TextTable) -> TextTable:
    """Return the columns that are shown at the end of a study."""
    places = [i for i, name in enumerate(table.columns) if name in SHOWN]
    rows = tuple(tuple(row[i] for i in places) for row in table.rows)
    columns = tuple(table.columns[i] for i in places)
    return TextTable(columns, tuple(table.right[i] for i in places), rows)


INPUTS = {"data", "stream", "federation", "model", "adapter"}
"""Tables of an experiment that say what is read and built."""
FAILED = 1
"""Exit code of a study in which a run failed."""


@dataclass(frozen=True)
class StudyRequest:
    """The arguments of ``deal study``.

    Attributes:
        study: a shipped name or the path of a TOML file, of a study or an experiment.
        out: folder of the study; empty: ``runs/study-NAME``.
        overrides: ``table.key=value``, for all cells.
        seeds: separated by commas; empty: the study's.
        epsilon: budgets, separated by commas; empty: the study's.
        only: names of cells, or parts or patterns of them, that are run now; empty: all.
        jobs: runs at a time; 0: as many as there are cores for.
    """

    study: str
    out: str = ""
    overrides: tuple[str, ...] = ()
    seeds: str = ""
    epsilon: str = ""
    only: str = ""
    jobs: int = 0


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

    def renew() -> StudyResults:
        return write(study, out, cells)

    renew()
    failures = run_left(left, out, request.jobs, command(request), renew, console) if left else {}
    if failures is None:
        return STOPPED
    results = renew()
    print_summary(console, study, results)
    told = {each.name for each in results.cells}
    for cell in cells:
        if cell.name not in told and finished(cell):
            print_line(console, f"left out: {cell.name}: its clients kept their counts")
    print_line(console, f"tables in {out / 'study.md'}, figures in {out / STUDY_JSON}")
    for name, why in failures.items():
        print_line(console, f"failed: {name}: {why}")
    return FAILED if failures else 0


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
    """Every error in the input shows before anything starts: all names, and what
    cells differ in of data and model, once each."""
    with console.status("checking the study and its data"):
        from simulations.run.check import preflight
        from simulations.run.preflight import check_names

        for experiment in left.values():
            check_names(experiment)
            check_counts(experiment)
        inputs = dict[tuple[str, ...], Experiment]()
        for each in left.values():
            read = each.model_dump_json(include=INPUTS)
            inputs[read, each.privacy.unit_column, str(each.run.seed)] = each
        for experiment in inputs.values():
            preflight(experiment)


def check_counts(experiment: Experiment) -> None:
    """A study compares accuracies.

    Raises:
        UserError: the clients keep theirs.
    """
    if experiment.privacy.metrics == "none":
        raise UserError(
            'privacy.metrics = "none": without counts there is no accuracy to compare; '
            'use "clear"; with privacy.mechanism = "record" also "noised"; with aggregation.secure '
            'also "summed"'
        )


def run_left(
    left: dict[str, Experiment],
    out: Path,
    jobs: int,
    again: Sequence[str],
    renew: Callable[[], object],
    console: Console,
) -> dict[str, str] | None:
    """Run what is left.

    Args:
        left: name to run; none of them finished.
        out: where they lie, for people.
        jobs: runs at a time; 0: as many as there are cores for.
        again: the command that continues.
        renew: called after every run that finished; writes the tables.
        console: for progress.

    Returns:
        Run and reason of every failure. None: it was interrupted.
    """
    failures: dict[str, str] = {}
    done: list[str] = []
    working: list[str] = []
    jobs = jobs or fitting(list(left.values()), os.cpu_count() or 1, gpus_here())
    print_line(console, f"{len(left)} runs left, {jobs} at a time, in {out}")
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
            why = why or renewed(renew)
            if why:
                failures[name] = why
            how = f"failed: {why}" if why else "finished"
            print_line(console, f"{len(done)}/{len(left)} {name} {how}")

        try:
            with stoppable():
                run_all(left, jobs, started, ended)
        except KeyboardInterrupt:
            print_line(console, f"stopped; {len(done)} of {len(left)} runs ended; continue with")
            print_line(console, f"  {shlex.join(again)}")
            return None
    return failures


def renewed(renew: Callable[[], object]) -> str:
    """Renew the tables; return why they cannot be, which stops no other run."""
    try:
        renew()
    except UserError as error:
        return str(error)
    return ""


def write(study: Study, out: Path, cells: Sequence[Cell]) -> StudyResults:
    """Write ``study.json`` and ``study.md`` of what has finished.

    Returns:
        What it found.

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
    texts = {
        STUDY_JSON: results.model_dump_json(indent=1) + "\n",
        "study.md": markdown(study, results),
    }
    write_texts(out, texts)
    return results


def fitting(runs: Sequence[Experiment], cores: int, gpus: int) -> int:
    """Runs at a time for which there are cores, and GPUs where there are some."""
    widest = max(run.run.threads * run.run.workers for run in runs)
    return max(1, min(cores // widest, gpus or cores))


def command(request: StudyRequest) -> list[str]:
    """Return the command again: it goes on where it was stopped."""
    words = ["deal", "study", request.study]
    for option, value in (
        ("--out", request.out),
        ("--seeds", request.seeds),
        ("--epsilon", request.epsilon),
        ("--only", request.only),
        ("--jobs", str(request.jobs or "")),
    ):
        words += [option, value] if value else []
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
    """Read ``a,b``."""
    return [word.strip() for word in text.split(",") if word.strip()]
