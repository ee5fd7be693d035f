"""Labels that are numbers, where a model reads the names of labels."""

from __future__ import annotations

import re
from collections.abc import Iterator

from deal_core.config.experiment import Experiment
from deal_core.data import TaskData

OWN_DATA = ("files", "hub")
"""Sources whose labels are somebody's own, and have a table ``label_text``."""
READS_NO_NAMES = ("prototype", "linear-probe")
"""Methods that answer by heads alone."""
NUMBER = re.compile(r"[-+]?\d+([.,]\d+)?")
SHOWN = 3


def number_labels(task: TaskData, experiment: Experiment) -> Iterator[str]:
    """Yield a line where all labels of a task are numbers, such as ids of classes: encoders compare
    texts with the names of labels, and models that answer in words say them."""
    source, method = experiment.data.source, experiment.method.name
    if source not in OWN_DATA or method in READS_NO_NAMES or not task.labels:
        return
    if all(NUMBER.fullmatch(label) for label in task.labels):
        shown = ", ".join(f"'{label}'" for label in task.labels[:SHOWN])
        more = ", ..." if len(task.labels) > SHOWN else ""
        yield (
            f"task '{task.name}': its labels are numbers ({shown}{more}), and the model reads "
            f"labels as words; set data.{source}.{task.name}.label_text to their names"
        )
