"""The embedded questions as files of sites, and the experiment on which all of them agree."""

from __future__ import annotations

import os
from collections.abc import Sequence

from deal_core.config.data import DataConfig, PartitionConfig
from deal_core.data import TaskData, open_source, partition
from deal_core.data.source import Example
from deal_core.errors import UserError
from simulations.deployment.demo.folder import DemoFolder
from simulations.output.toml import toml_value

TASKS = ("laboratory", "surgery")
TRAIN_ROWS = 240
"""Of a task, all sites together."""
TEST_ROWS = 120
SEED = 0

EXPERIMENT = """\
description = "Two tasks, which all sites of a demonstration work on"
[data]
source = "sites"
tasks = {tasks}
[data.labels]
{labels}
[federation]
rounds = 1
connect_seconds = 120
deadline_seconds = 300
[train]
max_length = 64
[run]
threads = {threads}
"""


def write_shares(folder: DemoFolder, names: Sequence[str]) -> None:
    """Divide the training and test questions of both tasks among the sites, as CSV, and write the
    experiment; every question is at one site.

    Args:
        folder: of the demonstration.
        names: of the sites.

    Raises:
        UserError: the embedded data are not installed, or the folder cannot be written.
    """
    source = open_source(DataConfig(tasks=TASKS, max_train=TRAIN_ROWS, max_test=TEST_ROWS))
    tasks = [source.load(name) for name in TASKS]
    try:
        for task in tasks:
            for name, share in zip(names, divided(task, len(names)), strict=True):
                for split, examples in (("train", share.train), ("test", share.test)):
                    _write(folder, name, f"{task.name}/{split}.csv", examples)
        folder.experiment.write_text(_experiment(tasks, len(names)), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{folder.path}: cannot be written ({error.strerror}); name another folder"
        ) from None


def divided(task: TaskData, sites: int) -> list[TaskData]:
    """Return each site's part: labels in other shares than elsewhere, as between hospitals."""
    return partition(task, PartitionConfig(kind="dirichlet", alpha=1.0), sites, SEED)


def _write(folder: DemoFolder, name: str, place: str, examples: Sequence[Example]) -> None:
    import pandas as pd

    path = folder.data(name) / place
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": each.text, "label": each.label} for each in examples]
    pd.DataFrame(rows, columns=["text", "label"]).to_csv(path, index=False)


def _experiment(tasks: Sequence[TaskData], sites: int) -> str:
    labels = "\n".join(f"{toml_value(task.name)} = {toml_value(task.labels)}" for task in tasks)
    threads = max(1, (os.cpu_count() or 1) // sites)
    return EXPERIMENT.format(tasks=toml_value(list(TASKS)), labels=labels, threads=threads)
