"""``deal check``: all that is wrong, or odd, with an experiment and its data; nothing starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from deal_core.config.experiment import Experiment
from deal_core.config.file import apply_overrides, parse_experiment, read_toml, sound_part
from deal_core.config.home import at_home
from deal_core.errors import UserError, choose
from deal_core.imports import without_collection
from simulations.check.finding import Check, Finding, reading, run_checks
from simulations.check.quick import QUICK, ROWS
from simulations.check.task_names import check_task_names
from simulations.engines.registry import ENGINES
from simulations.output.console import print_line
from simulations.run.experiment import find_experiment, own_folder, with_absolute_inputs
from simulations.run.privacy_warnings import warn_of_privacy

FAILED = 2


def check(name: str, overrides: tuple[str, ...], strict: bool, console: Console) -> int:
    """Print every finding as soon as it is there, and how many there are.

    Args:
        name: a shipped experiment or the path of a TOML file.
        overrides: ``table.key=value``, applied in order.
        strict: warnings count as errors.
        console: for people.

    Returns:
        The exit code: 0, or 2 where something is wrong.

    Raises:
        UserError: there is no such experiment, or its file is no TOML.
    """
    counts: Counter[str] = Counter()
    for finding in findings(name, overrides):
        counts[finding.kind] += 1
        kind = "" if finding.kind == "note" else f"{finding.kind}: "
        print_line(console, f"{kind}{finding.text}")
    errors, warnings = counts["error"], counts["warning"]
    if errors or warnings:
        print_line(console, f"{counted(errors, 'error')}, {counted(warnings, 'warning')}")
    else:
        print_line(console, "nothing is wrong")
    return FAILED if errors or (strict and warnings) else 0


def counted(count: int, word: str) -> str:
    """Return ``1 error``, ``2 errors``, ``no errors``."""
    return f"{count or 'no'} {word}{'' if count == 1 else 's'}"


def findings(name: str, overrides: tuple[str, ...]) -> Iterator[Finding]:
    """Yield what is wrong with an experiment: its keys, its data, and then what takes longer.

    Raises:
        UserError: there is no such experiment, its file is no TOML, or an override is none.
    """
    path = find_experiment(name)
    tables = read_toml(path)
    changed = apply_overrides(tables, overrides)
    experiment, unsound = sound_part(Experiment, changed)
    try:
        parse_experiment(tables, str(path))
        parse_experiment(changed, "--set")
    except UserError as error:
        for problem in error.problems:
            yield Finding(problem)
    folder = own_folder(name, path)
    yield from two_folders(experiment, folder)
    experiment = with_absolute_inputs(experiment, folder)
    if experiment.data.source == "sites":
        yield Finding('data.source = "sites": rows are read by deal site check', kind="warning")
        without_rows = (each for each in every_check() if each.settles != ROWS)
        yield from run_checks(without_rows, experiment, {*unsound, ROWS})
    else:
        yield from run_checks(every_check(), experiment, unsound)


def every_check() -> Iterator[Check]:
    """Yield the whole list; torch is imported when the quick ones are through."""
    yield from QUICK
    yield Check(check_task_names, reading("data"))
    yield Check(check_engine, reading("run"))
    yield Check(warn_of_privacy, reading("privacy", "data", "federation", "run", ROWS))
    with without_collection():
        from simulations.check.expected_membership import check_membership
        from simulations.run.preflight import CHECKS, METHOD, MODEL, TABLES

    yield from CHECKS
    yield Check(check_membership, reading(*TABLES, METHOD, MODEL, ROWS))


def check_engine(experiment: Experiment) -> None:
    """Look the engine up.

    Raises:
        UserError: unknown name.
    """
    choose("run.engine", experiment.run.engine, ENGINES)


def two_folders(experiment: Experiment, folder: Path | None) -> Iterator[Finding]:
    """Yield a warning where ``data.path`` is in the working directory and beside the experiment
    file, and they are not the same."""
    path = experiment.data.path
    if not path or folder is None or at_home(path).is_absolute():
        return
    here, there = Path(path).resolve(), (folder / path).resolve()
    if here.exists() and there.exists() and here != there:
        yield Finding(
            f"data.path = '{path}' is in the working directory and beside the experiment: "
            f"{here} is used, not {there}",
            kind="warning",
        )
