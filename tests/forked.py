"""Real processes for tests, forked from one that has imported what all of them need.

An import of torch, transformers and Flower costs seconds, and is not what these tests are of. Each
process runs a module or a script as Python would, and ends as Python would.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from subprocess import DEVNULL, STDOUT
from typing import IO, Any

from simulations.engines.worker_pool import PRELOADED

IMPORTED = (
    *PRELOADED,
    "server.app",
    "simulations.engines.inprocess",
    "simulations.engines.worker_pool",
    "simulations.run.preflight",
    "simulations.run.simulate",
    "simulations.run.summary",
)
PROGRAM = """
import atexit, gc, importlib, json, os, runpy, signal, sys, threading, traceback
from multiprocessing import util

spawn = util.spawnv_passfds

def spawn_or_fork(path, arguments, passed):
    # As a new interpreter: no other open files, its own handlers of signals, what goes wrong shown.
    if "forkserver" not in arguments[-1]:
        return spawn(path, arguments, passed)
    pid = os.fork()
    if pid:
        return pid
    gc.freeze()  # no file of the other process is closed
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
        os._exit(0)

# To look for garbage in what is imported takes seconds, here and when each process ends.
gc.disable()
for name in sys.argv[1:]:
    importlib.import_module(name)
gc.freeze()
gc.enable()
for line in sys.stdin:
    asked = json.loads(line)
    if "pid" in asked:
        pid, status = os.waitpid(asked["pid"], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        continue
    pid = os.fork()
    if not pid:
        break
    print(pid, flush=True)
else:
    sys.exit()

if asked["own_session"]:
    os.setsid()
util.spawnv_passfds = spawn_or_fork
for number, path in enumerate((os.devnull, *asked["output"])):
    opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    os.dup2(opened, number)
    os.close(opened)
os.chdir(asked["folder"])
os.environ.clear()
os.environ.update(asked["environment"])
sys.argv = ["", *asked["arguments"]]
code = 0
try:
    if asked["program"].endswith(".py"):
        sys.path.insert(0, os.path.dirname(asked["program"]))
        runpy.run_path(asked["program"], run_name="__main__")
    else:
        sys.modules.pop(asked["program"], None)
        runpy.run_module(asked["program"], run_name="__main__", alter_sys=True)
except SystemExit as end:
    code = end.code or 0
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
# What is frozen would be told as a leak; to look through it takes seconds.
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"""
"""Reads from its input what to fork, and whose end to tell."""
STEP = 0.02


class Process:
    """A process that was forked; the part of :class:`subprocess.Popen` that tests use."""

    def __init__(self, pid: int, ask: Callable[[Mapping[str, Any]], Any], output: Path) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ask = ask
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
            self.returncode = self._ask({"pid": self.pid})
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
    """The process that others are forked from."""

    def __init__(self, output: Path) -> None:
        self._output = output
        paths = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *IMPORTED],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # A library's threads would not be in what is forked.
            env={**os.environ, "PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"},
        )

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
        paths = os.pathsep.join(path for path in sys.path if path)
        pid = self._ask(
            {
                "program": program,
                "arguments": arguments,
                "folder": str(folder or Path.cwd()),
                "environment": {**os.environ, "PYTHONPATH": paths, **(environment or {})},
                "output": [str(log or output / "out"), str(log or output / "err")],
                "own_session": own_session,
            }
        )
        (output / "out").touch()
        (output / "err").touch()
        return Process(pid, self._ask, output)

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

    def close(self) -> None:
        self._process.communicate(timeout=60)

    def _ask(self, message: Mapping[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())
