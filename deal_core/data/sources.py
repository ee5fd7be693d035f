"""Sources of tasks, and the data of one task as a run's clients have it, before it is divided among
them. A source is a class and a line in ``SOURCES``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from deal_core.config.data import DataConfig
from deal_core.config.experiment import Experiment
from deal_core.data.embedded import EmbeddedTasks
from deal_core.data.files import FilesSource, SiteSource
from deal_core.data.given import GIVEN, GivenTasks
from deal_core.data.hub import HubSource
from deal_core.data.source import (
    DataSource,
    TaskData,
    declared_labels,
    each_by_itself,
    named_tasks,
    select_tasks,
    split_off_each,
    stratified,
)
from deal_core.errors import UserError, choose


class SitesSource:
    """Data of real deployments stay at the sites; tasks and labels, which the experiment names, are
    shared. Columns are a matter of the sites."""

    def __init__(self, config: DataConfig, unit_column: str = "") -> None:
        self._config = config

    def task_names(self) -> tuple[str, ...]:
        """Return ``data.tasks``, or every task of ``data.labels`` and ``data.generation``.

        Raises:
            UserError: there is none, or one is named that is in neither.
        """
        known = named_tasks(self._config)
        if not known:
            raise UserError(
                'data.source = "sites" needs [data.labels] with TASK = ["label", ...]: sites that '
                "cannot see each other's data must agree on the labels beforehand (tasks whose "
                "answers are texts: data.generation)"
            )
        return select_tasks(known, self._config.tasks, "task in data.labels or data.generation:")

    def load(self, task: str) -> TaskData:
        """Raise :class:`UserError`: there is nothing to read here."""
        raise UserError(
            f"task '{task}': data.source = \"sites\" is data that only the sites have; start the "
            'run with deal submit, or use data.source = "files" to simulate'
        )


SOURCES: dict[str, Callable[[DataConfig, str], DataSource]] = {
    "medmcqa": EmbeddedTasks,
    "embedded": EmbeddedTasks,
    "files": FilesSource,
    "hub": HubSource,
    "sites": SitesSource,
    "site": SiteSource,
}
"""``data.source`` to source. Heavy libraries load when a source reads, not here."""


def open_source(config: DataConfig, unit_column: str = "") -> DataSource:
    """Return the source that ``data.source`` names; reads nothing yet. ``unit_column`` is
    ``privacy.unit_column``, which every row must have; empty: none.

    Raises:
        UserError: unknown source, the message lists the known ones; or one without columns.
    """
    if config.source.startswith(GIVEN):
        return GivenTasks(config, unit_column)
    return choose("data.source", config.source, SOURCES, "sources")(config, unit_column)


def public_labels(config: DataConfig, task: str) -> tuple[str, ...]:
    """Return the label space of a task, none where its answers are texts. Where it is declared no
    data are read.

    Raises:
        UserError: the labels are in data that cannot be read.
    """
    declared = declared_labels(config, task)
    return open_source(config).load(task).labels if declared is None else declared


def load_for_clients(experiment: Experiment, task: str) -> TaskData:
    """Return a task's data within the experiment's limits.

    Where single records are protected, ``data.max_train`` takes about so many: whether a record is
    one of them depends on that record alone. A subset of exactly so many would be another one, with
    other records in it, for a neighbouring data set. Where groups are protected it depends on the
    name of the group alone: a group is there whole, or not. So it is with ``data.split``.

    Raises:
        UserError: see :meth:`~deal_core.data.source.DataSource.load`.
    """
    data, privacy = experiment.data, experiment.privacy
    if privacy.mechanism != "record":
        return open_source(data, privacy.unit_column).load(task)
    unlimited = data.model_copy(update={"max_train": 0, "max_test": 0})
    whole = open_source(unlimited, privacy.unit_column).load(task)
    train, test = whole.train, whole.test
    if whole.held_out:
        train, test = split_off_each((*train, *test), data.split)
    if data.max_train:
        train = each_by_itself(train, task, data.max_train / max(1, len(train)))
    return replace(whole, train=train, test=stratified(test, data.max_test))


def client_names(experiment: Experiment) -> list[str]:
    """Return the names of a run's clients, by their numbers: those of the sites, or the values of
    the partition column where each of them is one client; empty: clients have numbers alone."""
    data, federation = experiment.data, experiment.federation
    if federation.sites or data.partition.kind != "column" or data.source == "sites":
        return list(federation.sites)
    source = open_source(data, experiment.privacy.unit_column)
    groups = source.load(source.task_names()[0]).groups
    return list(groups) if len(groups) == federation.clients else []
