"""What a person should know of an experiment's unit of privacy before it runs; nothing stops."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from deal_core.config.experiment import Experiment
from deal_core.data import TaskData, load_for_clients, open_source, partition
from deal_core.data.identifiers import RepeatedIdentifier, repeated_identifiers
from deal_core.data.look_alike import alike_people
from simulations.check.finding import Finding


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
