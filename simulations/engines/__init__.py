"""Where a run's clients compute: in process, in worker processes, or under Flower's runtime. An
engine is a file and a line here; equal seeds, equal numbers.

Also what every process of a run does: it hears Ctrl-C and SIGTERM (the first stops and says what
it waits for, a second ends at once), and reads plugins, files of a user's own that an experiment
names and that add methods, rules, models and sources to the registries. A site of a deployment runs
what is installed there, and reads no plugin.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from traceback import walk_tb
from types import FrameType

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from server.folder import Listener


def _inprocess(experiment: Experiment, listener: Listener) -> None:
    from simulations.engines.inprocess import run_inprocess

    run_inprocess(experiment, listener)


def _flower(experiment: Experiment, listener: Listener) -> None:
    from simulations.engines.flower import run_flower

    run_flower(experiment, listener)


ENGINES: dict[str, Callable[[Experiment, Listener], None]] = {
    "inprocess": _inprocess,
    "flower": _flower,
    "loopback": _flower,
}
"""``run.engine`` to what runs an experiment to its end, hands every event to the listener, and
stops all that it started, also when it is interrupted."""


def warm_up(experiment: Experiment) -> None:
    """Start, in the background and before anything is checked, what takes seconds."""
    run = experiment.run
    if run.engine == "inprocess" and run.workers != 1 and experiment.federation.clients > 1:
        from simulations.engines.worker_pool import start_forkserver

        start_forkserver()


SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOPPED = 130
"""Exit code of what was interrupted."""
_came: list[int] = []
"""Signals that have come since the last block began that is stoppable."""


@contextmanager
def stoppable(waits: str) -> Iterator[None]:
    """Within the block the first Ctrl-C or SIGTERM says what it ``waits`` for and raises
    KeyboardInterrupt; a second ends this process and all that it has started.

    Also where Ctrl-C was ignored, as shells arrange for what they start in the background.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        _end_if_asked_twice(number)
        os.write(2, f"\nstopping: {waits}; Ctrl-C again ends at once\n".encode())
        raise KeyboardInterrupt

    _came.clear()
    try:
        with _handled(stop, SIGNALS):
            yield
    finally:
        _came.clear()


def stop_if_asked() -> None:
    """Stop where a signal came in a block of :func:`stoppable`: what it raised there, a library may
    have swallowed (a loader of models has).

    Raises:
        KeyboardInterrupt: a signal came.
    """
    if _came:
        raise KeyboardInterrupt


def _end_if_asked_twice(number: int, frame: FrameType | None = None) -> None:
    _came.append(number)
    if len(_came) > 1:
        import psutil

        if sys.stdout.isatty():
            os.write(1, b"\x1b[?25h")  # the cursor, which a spinner hides
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                process.kill()
        os._exit(STOPPED)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within the block what was started is being stopped: one signal is as good as none."""
    with _handled(_end_if_asked_twice, SIGNALS):
        yield


@contextmanager
def deferred() -> Iterator[None]:
    """Let both signals wait for the end of the block, for whoever handles them outside. Ignored or
    blocked they would be so in every process that is started in it.
    """
    came: list[int] = []
    try:
        with _handled(lambda number, frame: came.append(number), SIGNALS):
            yield
    finally:
        for number in came[:1]:
            signal.raise_signal(number)


@contextmanager
def ignoring_ctrl_c() -> Iterator[None]:
    """Within the block Ctrl-C is ignored, and by what is started in it ever after."""
    with _handled(signal.SIG_IGN, (signal.SIGINT,)):
        yield


@contextmanager
def _handled(
    handler: Callable[[int, FrameType | None], object] | signal.Handlers,
    numbers: Sequence[signal.Signals],
) -> Iterator[None]:
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, earlier in zip(numbers, before, strict=True):
            signal.signal(number, earlier)


_loaded: set[str] = set()
_told: set[str] = set()


def load_plugins(paths: Sequence[str]) -> None:
    """Import each file, once in a process.

    Raises:
        UserError: a file is missing or has a fault, named with its line.
    """
    for path in paths:
        if path in _loaded:
            continue
        if not Path(path).is_file():
            raise UserError(f"plugins: {path}: no such file")
        if not _loaded:
            logging.getLogger("client.identity").addFilter(_in_one_line)
        _loaded.add(path)
        name = f"deal_plugin_{Path(path).stem}"
        spec = spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise UserError(f"plugins: {path}: is no Python file; name one that ends in .py")
        sys.modules[name] = module = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            _loaded.discard(path)
            fault = own_fault(error, {path}) or f"{path}: {type(error).__name__}: {error}"
            raise UserError(fault) from None


def own_fault(error: BaseException, files: set[str] = _loaded) -> str:
    """Return file, line and text of an error that was raised in a plugin, or below it; empty: it
    was not."""
    if isinstance(error, SyntaxError) and error.filename in files:
        return f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    places = [
        f"{frame.f_code.co_filename}:{line}"
        for frame, line in walk_tb(error.__traceback__)
        if frame.f_code.co_filename in files
    ]
    return f"{places[-1]}: {type(error).__name__}: {error}" if places else ""


def _in_one_line(record: logging.LogRecord) -> bool:
    """Let a client's log tell a fault of a plugin in one line, and once."""
    _, error, _ = record.exc_info or (None, None, None)
    fault = own_fault(error) if error is not None else ""
    if not fault:
        return True
    record.msg, record.args, record.exc_info = fault, (), None
    first = fault not in _told
    _told.add(fault)
    return first
