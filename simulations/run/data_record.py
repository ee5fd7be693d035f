"""What the rows were when a run was started: so that one that goes on does so with the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import astuple
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from deal_core.config.experiment import Experiment
from deal_core.data import TaskData, load_for_clients, open_source
from deal_core.errors import UserError
from deal_core.whole_file import write_whole
from server.folder import RunFolder
from simulations.output.stored import read_stored

FORM = 1
"""Of the records that are written."""


class TaskRecord(BaseModel):
    """The rows of a task.

    Attributes:
        train, test: numbers of rows.
        sha256: of labels and rows, in their order.
    """

    model_config = ConfigDict(frozen=True)

    train: int
    test: int
    sha256: str


class DataRecord(BaseModel):
    """The rows of a run, task by task, as its clients have them.

    Attributes:
        form: what is hashed; 0: a version wrote it that looked at other rows than clients have.
    """

    model_config = ConfigDict(frozen=True)

    tasks: dict[str, TaskRecord]
    form: int = 0


def data_record(experiment: Experiment) -> DataRecord:
    """Return what the rows are now.

    Raises:
        UserError: they cannot be read.
    """
    names = open_source(experiment.data, experiment.privacy.unit_column).task_names()
    return DataRecord(
        tasks={name: _record(load_for_clients(experiment, name)) for name in names},
        form=FORM,
    )


def write_data_record(experiment: Experiment) -> None:
    """Write into the run folder what the rows are.

    Raises:
        UserError: they cannot be read, or the folder cannot be written.
    """
    path = RunFolder(Path(experiment.run.out)).data_record
    try:
        write_whole(path, data_record(experiment).model_dump_json(indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def check_data_record(experiment: Experiment, folder: Path, option: str, cure: str) -> None:
    """Check that the rows are those that a run was started with. A run of an earlier version has
    no record, and is believed.

    Args:
        experiment: says where the rows are.
        folder: of the run.
        option: of the command that needs the same rows, named first in a message.
        cure: besides putting the old rows back.

    Raises:
        UserError: they are not, a line for each task; or the record cannot be read.
    """
    before = _noted(folder)
    if before is None:
        return
    if changed := list(_changes(before, data_record(experiment), folder)):
        raise UserError(*(f"{option}: {change}, or {cure}" for change in changed))


def rows_of(folders: Iterable[Path]) -> dict[str, str]:
    """Return task to the SHA-256 of its rows, of the runs of a cell; without those of an earlier
    version, which told nothing or something else.

    Raises:
        UserError: a run's record cannot be read.
    """
    rows: dict[str, str] = {}
    for folder in folders:
        record = _noted(folder)
        if record is not None and record.form == FORM:
            rows |= {task: each.sha256 for task, each in record.tasks.items()}
    return rows


def _noted(folder: Path) -> DataRecord | None:
    """What a run has noted of its rows; None: nothing."""
    path = RunFolder(folder).data_record
    if not path.exists():
        return None
    return read_stored(DataRecord, path, "record of a run's rows", "remove it to go on")


def _changes(before: DataRecord, now: DataRecord, folder: Path) -> Iterator[str]:
    if list(before.tasks) != list(now.tasks):
        yield (
            f"the experiment has the tasks {', '.join(now.tasks)}, and the run in {folder} was "
            f"started with {', '.join(before.tasks)}; put them back"
        )
    for task, record in now.tasks.items():
        old = before.tasks.get(task) if before.form == now.form else None
        if old is not None and old != record:
            yield (
                f"the rows of task '{task}' are not those that the run in {folder} was started "
                f"with ({old.train} train and {old.test} test rows then, {record.train} and "
                f"{record.test} now); put the old files back"
            )


def _record(task: TaskData) -> TaskRecord:
    hashed = hashlib.sha256(json.dumps(task.labels).encode())
    for split in (task.train, task.test):
        for example in split:
            hashed.update(json.dumps(astuple(example)).encode() + b"\n")
        hashed.update(b"\n")
    return TaskRecord(train=len(task.train), test=len(task.test), sha256=hashed.hexdigest())
