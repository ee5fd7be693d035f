"""Data that nobody here has: every site has its own; all share the names of tasks and labels."""

from __future__ import annotations

from deal_core.config.data import DataConfig
from deal_core.data.source import TaskData, select_tasks
from deal_core.errors import UserError


class SitesSource:
    """The server's view: tasks and their labels, which the experiment names. Columns are a matter
    of the sites."""

    def __init__(self, config: DataConfig, unit_column: str = "") -> None:
        self._config = config

    def task_names(self) -> tuple[str, ...]:
        """Return ``data.tasks``, or every task of ``data.labels``.

        Raises:
            UserError: no task has labels, or one is named that has none.
        """
        if not self._config.labels:
            raise UserError(
                'data.source = "sites" needs [data.labels] with TASK = ["label", ...]: sites that '
                "cannot see each other's data must agree on the labels beforehand"
            )
        return select_tasks(self._config.labels, self._config.tasks, "task in data.labels:")

    def load(self, task: str) -> TaskData:
        """Raise :class:`UserError`: there is nothing to read here."""
        raise UserError(
            f"task '{task}': data.source = \"sites\" is data that only the sites have; start the "
            'run with deal submit, or use data.source = "files" to simulate'
        )
