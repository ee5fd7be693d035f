"""How many gradient canaries what learns has room for."""

from __future__ import annotations

from deal_core.config.experiment import Experiment
from deal_core.data import open_source, public_labels
from deal_core.models import embedding_size


def with_room(experiment: Experiment, canaries: int) -> int:
    """Return as many canaries as asked for, or as many as share no entry in the smallest task.

    A pooled adapter learns a row less than a task has labels; two entries are a canary's. Of other
    kinds there is room for thousands, and too many are refused where they are planted.

    Raises:
        UserError: the labels are in data that cannot be read.
    """
    if experiment.adapter.kind != "pooled":
        return canaries
    tasks = open_source(experiment.data).task_names()
    rows = min(len(public_labels(experiment.data, task)) - 1 for task in tasks)
    size = embedding_size(experiment.model)
    return max(2, min(canaries, min(rows, experiment.adapter.rank) * size // 2))
