"""Sources of tasks. A source is a file and a line here."""

from __future__ import annotations

from collections.abc import Callable

from deal_core.config.experiment import DataConfig
from deal_core.data.embedded import EmbeddedTasks
from deal_core.data.files import FilesSource
from deal_core.data.hub import HubSource
from deal_core.data.medmcqa import MedMCQA
from deal_core.data.site import SiteSource
from deal_core.data.sites import SitesSource
from deal_core.data.source import DataSource
from deal_core.errors import choose

SOURCES: dict[str, Callable[[DataConfig], DataSource]] = {
    "medmcqa": MedMCQA,
    "embedded": EmbeddedTasks,
    "files": FilesSource,
    "hub": HubSource,
    "sites": SitesSource,
    "site": SiteSource,
}
"""``data.source`` to source. Heavy libraries load when a source reads, not here."""


def open_source(config: DataConfig) -> DataSource:
    """Return the source that ``data.source`` names; reads nothing yet.

    Raises:
        UserError: unknown source; the message lists the known ones.
    """
    return choose("data.source", config.source, SOURCES)(config)
