"""The run folder before a run: may it be used, and with which settings was it started."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deal_core.config.experiment import Experiment
from deal_core.config.file import parse_experiment, read_toml
from deal_core.config.home import at_home
from deal_core.config.method import READ_BY
from deal_core.config.run_config import WHERE, Value, flatten, leaves
from deal_core.errors import UserError
from server.folder import RunFolder
from server.lock import exclusive_lock
from simulations.output.toml import toml_lines
from simulations.run.data_record import check_data_record, write_data_record

RECORD = "experiment.toml"
"""The whole experiment, beside the results; it can be run again as it is."""

PRECISION, AUTO = "train.precision", "auto"
"""The key whose default leaves it to the machine."""
TASK_TABLES = frozenset({"data.files", "data.hub"})
"""Settings that hold a table for each task."""


def check_folder(experiment: Experiment) -> None:
    """Check that the run folder is free, or, to resume, that it holds the same experiment.

    Raises:
        UserError: it holds a run already; there is nothing to resume; the settings differ.
    """
    folder = RunFolder(Path(experiment.run.out))
    if folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"{folder.path}: is a file; choose another --out")
    if not experiment.run.resume:
        if folder.holds_run:
            raise UserError(
                f"{folder.path}: already holds a run; continue it with --resume, "
                "or choose another --out"
            )
        return
    if not folder.can_resume:
        raise UserError(f"{folder.path}: holds no checkpoint to resume; start without --resume")
    before = recorded(folder.path)
    check_same(experiment, before, "--resume", "use that, or another --out")


@contextmanager
def claimed(experiment: Experiment) -> Iterator[None]:
    """Make the run folder and write the experiment into it; within the block it is ours.

    Raises:
        UserError: another process writes it, or has meanwhile; it cannot be written; or a run to
            be resumed was started with other rows.
    """
    with exclusive_lock(RunFolder(Path(experiment.run.out)).launching):
        check_folder(experiment)
        if experiment.run.resume:
            cure = "start in another --out"
            check_data_record(experiment, Path(experiment.run.out), "--resume", cure)
        record(experiment)
        if not experiment.run.resume:
            write_data_record(experiment)
        yield


def record(experiment: Experiment) -> None:
    """Make the run folder and write the experiment into it.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = RunFolder(Path(experiment.run.out))
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        if not experiment.run.resume:
            # Events of a start that never came to a checkpoint belong to no run.
            folder.metrics.unlink(missing_ok=True)
            (folder.path / RECORD).write_text(_as_toml(experiment), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{folder.path}: cannot be written ({error.strerror}); choose another --out"
        ) from None


def check_same(wanted: Experiment, before: Experiment, where: str, cure: str) -> None:
    """Check that a run folder holds the experiment that is wanted in it. Where precision is left
    to the machine, that of the machine it was started on stands.

    Raises:
        UserError: the first key that differs and matters, with both values, and the ``cure``.
    """
    there = flatten(before)
    asked = {k: v for k, v in flatten(wanted).items() if k not in WHERE}
    for key in differing(asked, there):
        raise UserError(
            f"{where}: '{key}' is {json.dumps(asked[key])}, but the run in {wanted.run.out} was "
            f"started with {json.dumps(there[key])}; {cure}"
        )


def differing(wanted: Mapping[str, Value], before: Mapping[str, Value]) -> list[str]:
    """Return the settings that are wanted otherwise than they were; where precision is left to the
    machine, that of any machine stands. Settings of a method that the run does not have say
    nothing."""
    method = str(wanted["method.name"])
    return [
        key
        for key, value in wanted.items()
        if _said(key, value) != _said(key, before[key])
        and (key, value) != (PRECISION, AUTO)
        and not _anothers(key, method)
    ]


def _anothers(key: str, method: str) -> bool:
    """Whether a setting is read by other methods alone."""
    group, _, rest = key.partition(".")
    table = rest.partition(".")[0]
    return group == "method" and method not in READ_BY.get(table, (method,))


def _said(key: str, value: Value) -> Any:
    """Return what a setting says: of a task's own columns none that is empty, which an earlier
    version may not have had."""
    if key not in TASK_TABLES:
        return value
    return {task: _filled(own) for task, own in json.loads(str(value)).items()}


def _filled(table: Mapping[str, Any]) -> dict[str, Any]:
    """Where a folder lies says nothing: ``data.path`` does not either."""
    said = {key: value for key, value in table.items() if value not in ("", {}, [])}
    return {k: v for k, v in said.items() if k != "path" or not at_home(str(v)).is_dir()}


def recorded(folder: Path) -> Experiment:
    """Return the experiment that a run folder was started with.

    Raises:
        UserError: there is no record, or none that can be read.
    """
    path = folder / RECORD
    return parse_experiment(read_toml(path), str(path))


def _as_toml(experiment: Experiment) -> str:
    """Dotted keys with real lists and tables: a file that reads back as the experiment."""
    return toml_lines(leaves(experiment) | {"run.resume": False})
