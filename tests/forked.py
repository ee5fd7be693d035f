"""Real processes for tests, forked from the one that tests run in.

An import of torch, transformers and Flower costs seconds, and is not what these tests are of. Each
process runs a module or a script as Python would, and ends as Python would.
"""

from __future__ import annotations

import atexit
import gc
import os
import runpy
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Mapping
from multiprocessing import forkserver, util
from pathlib import Path
from subprocess import DEVNULL, STDOUT
from typing import IO, Any

STEP = 0.02
SPAWN = util.spawnv_passfds


class Process:
    """A process that was forked; the part of :class:`subprocess.Popen` that tests use."""

    def __init__(self, pid: int, output: Path) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._output = output

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *raised: object) -> None:
        if raised[0] is not None:
            self.kill()
        self.wait()

    @property
    def stdout(self) -> str:
        """What it has written so far."""
        return (self._output / "out").read_text()

    @property
    def stderr(self) -> str:
        """The same."""
        return (self._output / "err").read_text()

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = 500.0) -> int:
        deadline = time.monotonic() + timeout
        while (ended := self.poll()) is None:
            assert time.monotonic() < deadline, f"it did not end: {self.stderr}"
            time.sleep(STEP)
        return ended

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 500.0) -> tuple[str, str]:
        self.wait(timeout)
        return self.stdout, self.stderr


class Forker:
    """``fork("simulations.cli", ...)``; what processes say goes to files in ``output``."""

    def __init__(self, output: Path) -> None:
        self._output = output

    def __call__(
        self,
        program: str,
        *arguments: str,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
        own_session: bool = False,
        log: Path | None = None,
    ) -> Process:
        """Start ``python -m program`` or ``python program.py``; the process that its workers are
        forked from, if it has some, is forked too. What it says goes to the end of ``log``."""
        output = Path(tempfile.mkdtemp(dir=self._output))
        (output / "out").touch()
        (output / "err").touch()
        pid = os.fork()
        if pid:
            return Process(pid, output)
        code = 1
        try:
            if own_session:
                os.setsid()
            begin_anew(log or output / "out", log or output / "err")
            os.chdir(folder or Path.cwd())
            os.environ.update(environment or {})
            code = played(program, *arguments)
            threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def popen(
        self, command: list[str], *, env: Mapping[str, str], stdout: IO[bytes], **options: Any
    ) -> Process:
        """Start the command as :class:`subprocess.Popen` would, which is ``python -P -m ...``."""
        *python, program = command[:4]
        arguments = command[4:]
        assert python == [sys.executable, "-P", "-m"]
        assert (options.pop("stdin"), options.pop("stderr")) == (DEVNULL, STDOUT)
        session = options.pop("start_new_session")
        assert not options
        log = Path(stdout.name)
        return self(program, *arguments, environment=env, own_session=session, log=log)


def begin_anew(out: Path, err: Path) -> None:
    """Leave the test: the process has files of its own, and nothing of pytest's."""
    for number, path in enumerate((Path(os.devnull), out, err)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, closefd=False) for number, mode in enumerate("rww")
    )
    warnings.resetwarnings()
    atexit._clear()
    gc.freeze()  # no file of the other process is closed
    forkserver._forkserver.__init__()
    util.spawnv_passfds = spawn_or_fork


def played(program: str, *arguments: str) -> int:
    """The exit code of a program that was run."""
    sys.argv = ["", *arguments]
    try:
        if program.endswith(".py"):
            sys.path.insert(0, os.path.dirname(program))
            runpy.run_path(program, run_name="__main__")
        else:
            sys.modules.pop(program, None)
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def spawn_or_fork(path: bytes, arguments: list[Any], passed: list[int]) -> int:
    """As a new interpreter: no other open files, its own handlers of signals, what goes wrong is
    shown."""
    if "forkserver" not in str(arguments[-1]):
        return SPAWN(path, arguments, passed)
    pid = os.fork()
    if pid:
        return pid
    below = 3
    for number in (*sorted(passed), os.sysconf("SC_OPEN_MAX")):
        os.closerange(below, number)
        below = number + 1
    fresh = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    for number, handler in fresh.items():
        if callable(signal.getsignal(number)):
            signal.signal(number, handler)
    try:
        exec(arguments[-1], {"__name__": "__main__"})
    except (Exception, KeyboardInterrupt):
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(0)
