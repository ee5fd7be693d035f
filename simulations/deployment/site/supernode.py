"""``python -m simulations.deployment.site.supernode SITE.TOML``: Flower's SuperNode, behind a gate.

Flower's SuperNode opens, unpacks and runs whatever app the server sends, and has no hook before
that. So this program replaces the one function of it that takes in a message together with its
app: an app other than the installed one ends here, as bytes of which only the SHA-256 was taken.
With another Flower, which lacks that function, the program ends before it connects. The processes
that run apps are this project's too (:mod:`superexec`, :mod:`clientapp`), and look once more.
"""

from __future__ import annotations

import importlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.supercore.constant import TaskType

from client.site_file import NODE_KEY, SiteFile, read_site
from client.site_log import SiteLog
from simulations.deployment.keys import write_secret
from simulations.deployment.site.clientapp import (
    REFUSAL,
    AppNotAllowed,
    own_digest,
    require_allowed,
)
from simulations.output.files import toml_value

LOCAL = "127.0.0.1"
SECRET = "superexec.secret"
ORDINARY = ("", TaskType.SERVER_APP)
"""Kinds of a run: of the others Flower would start other programs than a ClientApp."""

Pull = Callable[..., int | None]
internal: Any = importlib.import_module("flwr.supernode.start_client_internal")


def gated(pull: Pull, allowed: str, log: SiteLog) -> Pull:
    """Return Flower's ``pull``, which takes in a message, its run and the run's app, with a gate:
    a message whose app is not allowed is answered with an error, and nothing of it is kept.

    Args:
        pull: called with names; ``receive``, ``get_run`` and ``get_fab`` ask the server.
        allowed: SHA-256 of the app that may run.
        log: the site's own; it gets the SHA-256, and the cure.
    """

    def pull_allowed(**given: Any) -> int | None:
        last: list[Message] = []

        def receive() -> Any:
            received = given["receive"]()
            last[:] = [received[0]] if received is not None else []
            return received

        def get_run(run_id: int) -> Any:
            run = given["get_run"](run_id)
            if run.primary_task_type not in ORDINARY:
                raise AppNotAllowed("")
            return run

        def get_fab(fab_hash: str, run_id: int) -> Any:
            fab = given["get_fab"](fab_hash, run_id)
            require_allowed(fab.content, allowed)
            return fab

        asking = {"receive": receive, "get_run": get_run, "get_fab": get_fab}
        try:
            return pull(**{**given, **asking})
        except AppNotAllowed as error:
            note(log, error.digest, last[0].metadata.run_id)
            reply = Message(Error(ErrorCode.INVALID_FAB, REFUSAL), reply_to=last[0])
            internal._insert_message(reply, given["state"], given["object_store"])
            return last[0].metadata.run_id

    return pull_allowed


def note(log: SiteLog, digest: str, run_id: int) -> None:
    """Write the refusal and its cure into the site's log, and into Flower's."""
    cure = "the server has to start its runs with deal submit"
    log.write("app_refused", app=digest, flower_run=run_id, cure=cure)
    print(f"app {digest or 'of another kind'} refused; {cure}", flush=True)


def supernode_arguments(path: Path, site: SiteFile, port: int, secret: Path) -> list[str]:
    """For Flower's own program; the app is told nothing but where ``site.toml`` lies."""
    return [
        *("--root-certificates", site.server.certificate),
        *("--auth-supernode-private-key", site.server.key),
        *("--superlink", site.server.address),
        *("--host", LOCAL, "--port", str(port)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
        *("--node-config", f"{NODE_KEY}={toml_value(str(path))}"),
    ]


def superexec_command(allowed: str, port: int, secret: Path) -> list[str]:
    """Return the program that starts a process for every message. ``-P``: nothing is imported from
    its working directory, which apps can write."""
    return [
        *(sys.executable, "-P", "-m", "simulations.deployment.site.superexec", allowed),
        *("--insecure", "--runtime-api-address", f"{LOCAL}:{port}"),
        *("--superexec-auth-secret-file", str(secret), "--parent-pid", str(os.getpid())),
    ]


def new_secret(home: Path) -> Path:
    """Return a file that lets the process that starts apps, and nobody else on this machine, take
    tasks from the SuperNode."""
    secret = home / SECRET
    secret.unlink(missing_ok=True)
    write_secret(secret, secrets.token_hex(32).encode())
    return secret


def main() -> None:
    """Serve until a signal comes."""
    path, home = Path(sys.argv[1]), Path(os.environ["FLWR_HOME"])
    site = read_site(path)
    allowed = own_digest()
    # Flower finds an unpacked app by eight digits of a hash; what lies there from before must not
    # be taken for the app that is allowed.
    shutil.rmtree(home / "apps", ignore_errors=True)
    log = SiteLog(Path(site.site.state))
    internal._pull_and_store_message = gated(internal._pull_and_store_message, allowed, log)
    port, secret = _free_port(), new_secret(home)
    subprocess.Popen(superexec_command(allowed, port, secret), stdin=subprocess.DEVNULL)
    sys.argv = ["flower-supernode", *supernode_arguments(path, site, port, secret)]
    from flwr.supernode.cli import flower_supernode

    flower_supernode()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOCAL, 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
