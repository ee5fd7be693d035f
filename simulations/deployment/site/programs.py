"""The site's own start of Flower's programs: ``python -m simulations.deployment.site.programs``
with ``supernode SITE.TOML`` or ``superexec ...``.

Flower's SuperNode unpacks and runs the app that the server sends. Here it is given the installed
one in its place, under its own name, version and hash, and each run is taken for an ordinary one: a
site runs what it has installed itself. With another Flower, which lacks the functions that are
replaced, the programs end before they connect.

``superexec`` starts ``clientapp`` for a message to a ClientApp, and no other program: a process of
its own, forked from one that has imported what all of them need. An error that leaves carries no
text: Flower would send that of an exception.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import multiprocessing
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Error, Message
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.run import Run

from client.site_file import NODE_KEY, read_site
from simulations.deployment.keys import write_secret
from simulations.engines.flower import BUNDLE, LOCAL, free_port
from simulations.output import toml_value

if TYPE_CHECKING:
    from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult

MODULE = "simulations.deployment.site.programs"
NEEDED = ("flwr.supernode.runtime.run_clientapp", "client.app", MODULE)
"""Modules that every ClientApp needs; they open no connection and start no thread."""
IDLE_POLL_SECONDS, POLL_SECONDS, BUSY_SECONDS = 3.0, 0.5, 60.0
"""How long a SuperNode waits before it asks for a message again (Flower's own); how long while the
last one is younger than the third: the exchanges of a secure sum follow each other."""
TASK_POLL_SECONDS = 0.25
"""How often a site's own programs look for a message that the SuperNode has taken in."""


@cache
def own_app() -> Fab:
    """Return the bundle that ``flwr run`` builds: it holds no time and no path, and nothing in it
    is compressed, so the same files give the same bytes everywhere."""
    from flwr.cli.build import build_fab_from_files

    files = {path.name: path for path in BUNDLE.iterdir() if path.is_file()}
    content = build_fab_from_files(files)[0]
    return Fab(hashlib.sha256(content).hexdigest(), content, {})


def with_own_app(pull: Callable[..., int | None]) -> Callable[..., int | None]:
    """Return Flower's ``pull``, which takes in a message, its run and the run's app: the app is the
    installed one, and so is all that the run says of it."""
    from flwr.common.config import get_fab_config, get_metadata_from_config

    own, last = own_app(), -BUSY_SECONDS
    name, version = get_metadata_from_config(get_fab_config(own.content))
    true: dict[str, Any] = {"fab_id": name, "fab_version": version, "fab_hash": own.hash_str}

    def pull_own(**given: Any) -> int | None:
        nonlocal last

        def get_run(run_id: int) -> Run:
            run: Run = given["get_run"](run_id)
            return dataclasses.replace(run, primary_task_type=TaskType.SERVER_APP, **true)

        own_given = {**given, "get_run": get_run, "get_fab": lambda fab_hash, run_id: own}
        end = time.monotonic() + IDLE_POLL_SECONDS - POLL_SECONDS
        while (run_id := pull(**own_given)) is None and time.monotonic() < end:
            if time.monotonic() - last >= BUSY_SECONDS:
                return None
            time.sleep(POLL_SECONDS)
        if run_id is not None:
            last = time.monotonic()
        return run_id

    return pull_own


def new_secret(home: Path) -> Path:
    """Return a file that lets this user's processes alone take tasks from the SuperNode."""
    secret = home / "superexec.secret"
    secret.unlink(missing_ok=True)
    write_secret(secret, secrets.token_hex(32).encode())
    return secret


def supernode(path: Path) -> None:
    """Serve until a signal comes."""
    internal: Any = importlib.import_module("flwr.supernode.start_client_internal")
    internal._pull_and_store_message = with_own_app(internal._pull_and_store_message)
    server, home = read_site(path).server, Path(os.environ["FLWR_HOME"])
    # Flower finds an unpacked app by eight digits of a hash; what lies there from before must not
    # be taken for the installed one.
    shutil.rmtree(home / "apps", ignore_errors=True)
    port, secret = free_port(), new_secret(home)
    command = [
        *(sys.executable, "-P", "-m", MODULE, "superexec"),
        *("--insecure", "--runtime-api-address", f"{LOCAL}:{port}"),
        *("--superexec-auth-secret-file", str(secret), "--parent-pid", str(os.getpid())),
    ]
    subprocess.Popen(command, stdin=subprocess.DEVNULL)
    sys.argv = [
        "flower-supernode",
        *("--root-certificates", server.certificate),
        *("--auth-supernode-private-key", server.key),
        *("--superlink", server.address),
        *("--host", LOCAL, "--port", str(port)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
        *("--node-config", f"{NODE_KEY}={toml_value(str(path))}"),  # all that the app knows
    ]
    from flwr.supernode.cli import flower_supernode

    flower_supernode()


class ClientAppExecutor:
    """Flower's interface of an executor; it starts ClientApps alone."""

    def __init__(self) -> None:
        self.forks = multiprocessing.get_context("forkserver")
        self.forks.set_forkserver_preload(list(NEEDED))

    def get_eligible_capacity(
        self, supported_task_types: set[TaskType], **where: Any
    ) -> tuple[set[TaskType], set[str]]:
        """Return ClientApps alone: what else there is stays with the SuperNode."""
        return supported_task_types & {TaskType.CLIENT_APP}, set()

    def wait_for_capacity(self, task_type: TaskType | None = None, **where: Any) -> None:
        """There is room always: the SuperNode hands out one message at a time."""

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Start a process for one message; its token goes through a pipe, closed to other users."""
        from flwr.supercore.superexec.executor import LaunchResult

        if spec.task_type != TaskType.CLIENT_APP:
            return LaunchResult.failed("this site runs ClientApps only")
        words = ["--insecure", "--runtime-api-address", spec.runtime_api_address]
        if spec.parent_pid is not None:
            words += ["--parent-pid", str(spec.parent_pid)]
        self.forks.Process(target=clientapp, args=(words, spec.token), daemon=True).start()
        return LaunchResult.accepted()

    def reconcile(self) -> None:
        """Collect the processes that have ended."""
        multiprocessing.active_children()

    def close(self) -> None:
        """Do nothing: nothing is kept open."""


def superexec() -> None:
    """Start processes until the SuperNode ends."""
    flower: Any = importlib.import_module("flwr.supercore.superexec.run_superexec")
    if not callable(flower.get_executor):
        raise TypeError("this Flower makes its executor in another way")
    flower.get_executor = lambda *given, **named: ClientAppExecutor()
    os.environ[flower._TASK_POLL_INTERVAL_ENV] = str(TASK_POLL_SECONDS)
    from flwr.supercore.cli import flower_superexec

    flower_superexec()


def pushing(push: Callable[..., None]) -> Callable[..., None]:
    """Flower's ``push``, with errors that say nothing but their code."""

    def push_message(client: Any, message: Message, context: Context) -> None:
        if message.has_error():
            message.error = Error(message.error.code, "failed")
        push(client, message, context)

    return push_message


def clientapp(words: Sequence[str], token: str) -> None:
    """Answer one message: Flower's program with these words."""
    sys.argv = ["flwr-clientapp", *words, "--token", token]
    flower: Any = importlib.import_module("flwr.supernode.runtime.run_clientapp")
    flower.push_message = pushing(flower.push_message)
    from flwr.supernode.cli import flwr_clientapp

    flwr_clientapp()


if __name__ == "__main__":
    which = sys.argv.pop(1)
    if which == "supernode":
        supernode(Path(sys.argv[1]))
    else:
        superexec()
