"""Data that nobody here has: every site has its own; all share the names of tasks and labels."""

from __future__ import annotations

from deal_core.config.data import DataConfig
from deal_core.data.source import TaskData, select_tasks
from deal_core.errors import UserError


def named_tasks(config: DataConfig) -> tuple[str, ...]:
    """Return the tasks that an experiment names: those with labels, then those whose answers are
    texts."""
    return tuple(dict.fromkeys([*config.labels, *config.generation]))


class SitesSource:
    """The server's view: tasks and their labels, which the experiment names. Columns are a matter
    of the sites."""

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
