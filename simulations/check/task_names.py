"""Names of tasks in tables of ``data`` that are of none."""

from __future__ import annotations

from collections.abc import Iterator

from deal_core.config.experiment import Experiment
from deal_core.data import open_source
from deal_core.errors import nearest
from simulations.check.finding import Finding

BY_TASK = ("labels", "generation", "measures", "instructions", "files")


def check_task_names(experiment: Experiment) -> Iterator[Finding]:
    """Yield a warning for each name that the source has no task of: what is set for it is not used.

    Raises:
        UserError: the source cannot be opened.
    """
    data = experiment.data
    known = open_source(data.model_copy(update={"tasks": ()})).task_names()
    for table in BY_TASK:
        for name in getattr(data, table):
            if name not in known:
                text = f"data.{table}: there is no task '{name}'{nearest(name, known)}"
                yield Finding(f"{text}; what is set for it is not used", kind="warning")
