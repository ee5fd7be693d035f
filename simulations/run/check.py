"""``deal check``: all that is wrong, or odd, with an experiment and its data; nothing starts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from rich.console import Console

from deal_core.config.experiment import Experiment
from deal_core.config.file import apply_overrides, parse_experiment, read_toml, sound_part
from deal_core.data import TaskData, load_for_clients, open_source, partition
from deal_core.data.identifiers import RepeatedIdentifier, alike_people, repeated_identifiers
from deal_core.errors import UserError, choose
from deal_core.installed import without_collection
from simulations.engines.registry import ENGINES
from simulations.output.console import print_line
from simulations.run.experiment import find_experiment, own_folder, with_absolute_inputs
from simulations.run.findings import Check, Finding, check_task_names, reading, run_checks
from simulations.run.rows import QUICK, ROWS

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
        from simulations.run.data_checks import check_membership
        from simulations.run.preflight import CHECKS, METHOD, MODEL, TABLES

    yield from CHECKS
    yield Check(check_membership, reading(*TABLES, METHOD, MODEL, ROWS))


def check_engine(experiment: Experiment) -> None:
    """Look the engine up.

    Raises:
        UserError: unknown name.
    """
    choose("run.engine", experiment.run.engine, ENGINES)


def privacy_warnings(experiment: Experiment) -> list[str]:
    """Return warnings, a line each, about records of one person where mechanism ``record`` protects
    them.

    Raises:
        UserError: the data cannot be read or divided.
    """
    if experiment.privacy.mechanism != "record":
        return []
    divided = list(_divided_by_number(experiment))
    if not experiment.privacy.unit_column:
        found = repeated_identifiers(experiment.data)
        return [*divided, *(identifier_warning(each, "privacy.unit_column") for each in found)]
    tasks = open_source(experiment.data).task_names()
    loaded = [load_for_clients(experiment, task) for task in tasks]
    return [*divided, *_groups(experiment, loaded)]


def warn_of_privacy(experiment: Experiment) -> Iterator[Finding]:
    """Yield what a person should know of the unit of privacy."""
    for line in privacy_warnings(experiment):
        yield Finding(line, kind="warning")


def identifier_warning(found: RepeatedIdentifier, key: str) -> str:
    """Return what a repeated identifier means where single records are protected.

    Args:
        found: the column.
        key: that would make it the unit.
    """
    return (
        f"{found}: epsilon is of one record, and says nothing of somebody with several; "
        f"if that is who the column names, set {key} = '{found.column}'"
    )


def alike_people_warning(task: TaskData) -> Iterator[str]:
    """Yield a line where names or numbers of people differ in punctuation alone."""
    found = alike_people(e.unit or e.id for e in (*task.train, *task.test))
    if found:
        named = " and ".join(map(ascii, found[0][:2]))
        more = f" ({len(found) - 1} more such)" if len(found) > 1 else ""
        yield (
            f"task '{task.name}': {named} look alike, and are two people{more}; write them alike "
            "where they are one"
        )


def both_sides_warning(task: TaskData) -> Iterator[str]:
    """Yield a line where groups of a task are among its training and its test records."""
    both = {e.unit for e in task.train if e.unit} & {e.unit for e in task.test}
    if both:
        yield (
            f"task '{task.name}': {len(both)} groups have training and test records: its "
            "accuracy is partly of people that the model has seen"
        )


def _divided_by_number(experiment: Experiment) -> Iterator[str]:
    """Yield a line where one record more would move others between simulated clients, and the noise
    is one that holds."""
    privacy, kind = experiment.privacy, experiment.data.partition.kind
    apart = kind == "column" or (kind == "iid" and privacy.unit_column)
    if privacy.noise == "secure" and not apart:
        yield (
            f"data.partition.kind = '{kind}' divides rows by how many there are: each epsilon is "
            "of a client's share as it was cut, not of the rows before; data.partition.kind = "
            '"column" gives each record its client by itself'
        )


def _groups(experiment: Experiment, tasks: Iterable[TaskData]) -> Iterator[str]:
    config, clients_of = experiment, defaultdict(set)
    for task in tasks:
        yield from both_sides_warning(task)
        yield from alike_people_warning(task)
        shares = partition(task, config.data.partition, config.federation.clients, config.run.seed)
        for client, share in enumerate(shares):
            for example in share.train:
                clients_of[example.unit].add(client)
    several = sum(len(clients) > 1 for clients in clients_of.values())
    if several:
        yield (
            f"{several} of {len(clients_of)} groups have records at more than one client: "
            'each epsilon is of what its client has; data.partition.kind = "iid" keeps a group at '
            "one client in all tasks"
        )
