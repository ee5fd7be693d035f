"""Sources of tasks. A source is a file and a line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from deal_core.config.data import DataConfig
from deal_core.data.embedded import EmbeddedTasks
from deal_core.data.files import FilesSource
from deal_core.data.hub import HubSource
from deal_core.data.medmcqa import MedMCQA
from deal_core.data.site import SiteSource
from deal_core.data.sites import SitesSource
from deal_core.data.source import DataSource, declared_labels
from deal_core.errors import UserError, choose

SOURCES: dict[str, Callable[[DataConfig], DataSource]] = {
    "medmcqa": MedMCQA,
    "embedded": EmbeddedTasks,
    "files": FilesSource,
    "hub": HubSource,
    "sites": SitesSource,
    "site": SiteSource,
}
"""``data.source`` to source. Heavy libraries load when a source reads, not here."""


class MakeByColumns(Protocol):
    """Builds a source whose rows have columns."""

    def __call__(self, config: DataConfig, unit_column: str = "") -> DataSource:
        """Return the source; the unit column is that whose values make groups; empty: none."""


BY_COLUMNS: dict[str, MakeByColumns] = {
    "files": FilesSource,
    "hub": HubSource,
    "sites": SitesSource,
    "site": SiteSource,
}
"""Those of them whose rows can say whose they are."""


def open_source(config: DataConfig, unit_column: str = "") -> DataSource:
    """Return the source that ``data.source`` names; reads nothing yet.

    Args:
        config: of the data.
        unit_column: ``privacy.unit_column``: the column that every row must have; empty: none.

    Raises:
        UserError: unknown source, the message lists the known ones; or one without columns.
    """
    make = choose("data.source", config.source, SOURCES)
    if not unit_column:
        return make(config)
    if config.source not in BY_COLUMNS:
        raise UserError(
            f"privacy.unit_column = '{unit_column}' needs rows with columns, and data.source "
            f"'{config.source}' has none; use files or hub, or leave it empty"
        )
    return BY_COLUMNS[config.source](config, unit_column)


def public_labels(config: DataConfig, task: str) -> tuple[str, ...]:
    """Return the label space of a task, none where its answers are texts. Where it is declared no
    data are read.

    Raises:
        UserError: the labels are in data that cannot be read.
    """
    declared = declared_labels(config, task)
    return open_source(config).load(task).labels if declared is None else declared
