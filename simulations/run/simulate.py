"""One run: from its checks to its report, and its folder: may it be used, and with which settings
and rows was it started."""

import hashlib
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path

from pydantic import RootModel
from rich.console import Console

from deal_core.atomic_write import atomic_write
from deal_core.config.experiment import READ_BY, Experiment, show_device
from deal_core.config.file import WHERE, Value, flatten, leaves, parse_experiment, read_toml
from deal_core.data import TaskData, load_for_clients, open_source
from deal_core.errors import UserError, choose
from server.folder import OTHER_OUT, Listener, RunFolder, exclusive_lock, held
from simulations.engines import ENGINES, STOPPED, stoppable, warm_up
from simulations.output import at_work, print_line, read_stored, toml_lines
from simulations.run.check import Say, preflight
from simulations.run.experiment import Request, load_experiment
from simulations.run.run_log import told_to

WAITS = "the clients at work end what they do, then the report is written"


def simulate(
    request: Request, console: Console, write_page: Callable[[Path], None] = lambda folder: None
) -> int:
    """Run the experiment, show it, report it.

    Args:
        request: what was typed.
        console: for people.
        write_page: called with the run folder of a run that has begun, however it ended.

    Returns:
        The exit code: 0; 130 where it was stopped.

    Raises:
        UserError: bad input (nothing has started), or a run that cannot go on.
    """
    with at_work(console, "reading the experiment"):  # and the plugins that it names
        experiment = load_experiment(request)
    folder = Path(experiment.run.out)
    before = _events(folder)
    check_free(experiment)
    if RunFolder(folder).results.exists():
        print_line(console, f"{folder}: the run has finished, nothing is left to do")
        return 0
    try:
        with stoppable(WAITS), at_work(console, "checking the experiment") as say:
            engine = prepare(experiment, lambda line: print_line(console, f"warning: {line}"), say)
            with claimed(experiment):
                engine(experiment, told_to(console, say))
    except BaseException as stop:
        if _events(folder) != before:
            write_page(folder)
        if not isinstance(stop, KeyboardInterrupt):
            raise
        for line in stopped_lines(RunFolder(folder)):
            print_line(console, line)
        return STOPPED
    from simulations.run.summary import print_report

    print_report(console, folder)
    write_page(folder)
    return 0


def _events(folder: Path) -> int:
    """Bytes of a run's log; 0: it has none."""
    log = RunFolder(folder).metrics
    return log.stat().st_size if log.is_file() else 0


def prepare(
    experiment: Experiment, warn: Callable[[str], None], say: Say = lambda what: None
) -> Callable[[Experiment, Listener], None]:
    """Make every check that can be made before the run starts; ``warn`` hears of warnings, and
    ``say`` of what is checked.

    Returns:
        The engine, which runs it.

    Raises:
        UserError: bad input; nothing has started.
    """
    check_free(experiment)
    engine = choose("run.engine", experiment.run.engine, ENGINES)
    show_device(experiment.run.device)
    warm_up(experiment)
    preflight(experiment, warn, say)
    return engine


def stopped_lines(folder: RunFolder) -> list[str]:
    """Say what is left of an interrupted run, and with which command it goes on."""
    if not folder.can_resume:
        return ["stopped before the first checkpoint; start again with the same command"]
    typed = [word for word in sys.argv[1:] if word != "--resume"]
    return [
        f"stopped; the checkpoint is in {folder.path}; continue with",
        f"  {shlex.join(['deal', *typed, '--resume'])}",
    ]


RECORD = "experiment.toml"
"""The whole experiment, beside the results; it can be run again as it is."""

PRECISION, AUTO = "train.precision", "auto"
"""The key whose default leaves it to the machine."""


def check_free(experiment: Experiment) -> None:
    """Check that no process writes the run folder, and that it can hold this run.

    Raises:
        UserError: one does, or it cannot (:func:`check_folder`).
    """
    if held(RunFolder(Path(experiment.run.out)).launching):
        raise UserError(f"{experiment.run.out}: another process is writing this run; {OTHER_OUT}")
    check_folder(experiment)


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
            check_rows_same(experiment, Path(experiment.run.out), "--resume", cure)
        record(experiment)
        if not experiment.run.resume:
            write_row_hashes(experiment)
        yield


def record(experiment: Experiment) -> None:
    """Make the run folder and write the experiment into it, or raise UserError."""
    folder = RunFolder(Path(experiment.run.out))
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        if not experiment.run.resume:
            # Events of a start that never came to a checkpoint belong to no run.
            folder.metrics.unlink(missing_ok=True)
            write_settings(experiment)
    except OSError as error:
        raise UserError(
            f"{folder.path}: cannot be written ({error.strerror}); choose another --out"
        ) from None


def write_settings(experiment: Experiment) -> None:
    """Write the experiment into its run folder."""
    settings = toml_lines(leaves(experiment) | {"run.resume": False})
    (Path(experiment.run.out) / RECORD).write_text(settings, encoding="utf-8")


def check_same(wanted: Experiment, before: Experiment, where: str, cure: str) -> None:
    """Check that a run folder holds the experiment that is wanted in it.

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
    """Return the settings that are wanted otherwise than they were. Where precision is left to the
    machine, that of any machine stands; settings of other methods do not count."""
    method = str(wanted["method.name"])
    return [
        key
        for key, value in wanted.items()
        if value != before[key] and (key, value) != (PRECISION, AUTO) and not _anothers(key, method)
    ]


def _anothers(key: str, method: str) -> bool:
    """Whether a setting is read by other methods alone."""
    group, table, *_ = f"{key}.".split(".")
    return group == "method" and method not in READ_BY.get(table, (method,))


def recorded(folder: Path) -> Experiment:
    """Return the experiment that a run folder was started with."""
    path = folder / RECORD
    return parse_experiment(read_toml(path), str(path))


class RowHashes(RootModel[dict[str, str]]):
    """Task to the SHA-256 of its labels and rows, in their order, as the clients of a run have
    them."""


def row_hashes(experiment: Experiment) -> RowHashes:
    """Return those of the rows that are there now."""
    names = open_source(experiment.data, experiment.privacy.unit_column).task_names()
    return RowHashes({name: _hash(load_for_clients(experiment, name)) for name in names})


def _hash(task: TaskData) -> str:
    hashed = hashlib.sha256(json.dumps(task.labels).encode())
    for split in (task.train, task.test):
        for example in split:
            hashed.update(json.dumps(astuple(example)).encode() + b"\n")
        hashed.update(b"\n")
    return hashed.hexdigest()


def write_row_hashes(experiment: Experiment) -> None:
    """Write into the run folder what the rows are, or raise UserError."""
    path = RunFolder(Path(experiment.run.out)).row_hashes
    try:
        atomic_write(path, row_hashes(experiment).model_dump_json(indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def check_rows_same(experiment: Experiment, folder: Path, option: str, cure: str) -> None:
    """Check that the rows are those that a run was started with. A run over sites has no record of
    rows, which are theirs.

    Args:
        experiment: says where the rows are.
        folder: of the run.
        option: of the command that needs the same rows, named first in a message.
        cure: besides putting the old rows back.

    Raises:
        UserError: they are not, a line for each task; or the record cannot be read.
    """
    before = rows_of([folder])
    if not before:
        return
    now = row_hashes(experiment).root
    problems = [
        f"{option}: the rows of task '{task}' are not those that the run in {folder} was started "
        f"with; put the old files back, or {cure}"
        for task, sha256 in now.items()
        if before.get(task, sha256) != sha256
    ]
    if list(before) != list(now):
        problems.append(
            f"{option}: the experiment has the tasks {', '.join(now)}, and the run in {folder} was "
            f"started with {', '.join(before)}; put them back, or {cure}"
        )
    if problems:
        raise UserError(*problems)


def rows_of(folders: Iterable[Path]) -> dict[str, str]:
    """Return task to the SHA-256 of its rows, as the runs of a cell have noted them."""
    found: dict[str, str] = {}
    for path in (RunFolder(folder).row_hashes for folder in folders):
        if path.exists():
            cure = "remove it to go on"
            found |= read_stored(RowHashes, path, "record of a run's rows", cure).root
    return found
