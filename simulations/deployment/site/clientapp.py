"""``python -m simulations.deployment.site.clientapp DIGEST ...``: Flower's process for one
message, which looks at the app's bytes before it unpacks them.

The only app that a site runs is the ten lines that are installed here, which import what is
installed here. Of another app, which the server may send, nothing is unpacked. The SuperNode has
looked already; this holds also where it has not. What the server claims of the app, its name,
version and hash, is replaced by what the bytes say, since Flower makes a path of it. An error that
leaves carries no text: Flower would send that of an exception.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message
from flwr.common.config import get_fab_config, get_metadata_from_config
from flwr.supercore.fab import Fab
from flwr.supercore.run import Run

from simulations.engines.flower import BUNDLE

REFUSAL = "the app is not allowed at this site"
"""All that the server is told."""
TaskInput = tuple[Message, Context, Run, Fab]


class AppNotAllowed(Exception):
    """The site does not run this app; ``digest`` is its SHA-256, which the text does not hold."""

    def __init__(self, digest: str) -> None:
        super().__init__(REFUSAL)
        self.digest = digest


def own_app() -> bytes:
    """Return the bundle that ``flwr run`` builds: it holds no time and no path, and nothing in it
    is compressed, so the same files give the same bytes everywhere."""
    from flwr.cli.build import build_fab_from_files

    files = {path.name: path for path in BUNDLE.iterdir() if path.is_file()}
    return build_fab_from_files(files)[0]


def own_digest() -> str:
    """Return the SHA-256 of :func:`own_app`."""
    return digest_of(own_app())


def digest_of(content: bytes) -> str:
    """Return the SHA-256 of an app's bytes, as hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def require_allowed(content: bytes, allowed: str) -> None:
    """Check an app against the digest of the one that may run.

    Raises:
        AppNotAllowed: it is another.
    """
    if digest_of(content) != allowed:
        raise AppNotAllowed(digest_of(content))


def as_it_is(run: Run, fab: Fab) -> tuple[Run, Fab]:
    """Return both with name, version and hash of the app as its bytes have them."""
    digest = digest_of(fab.content)
    name, version = get_metadata_from_config(get_fab_config(fab.content))
    true_run = dataclasses.replace(run, fab_id=name, fab_version=version, fab_hash=digest)
    return true_run, Fab(digest, fab.content, {})


def pulling(pull: Callable[..., TaskInput], allowed: str) -> Callable[..., TaskInput]:
    """Return Flower's ``pull``, with nothing left of what the server claims of an allowed app;
    another one is not even looked into."""

    def pull_task_input(client: Any) -> TaskInput:
        message, context, run, fab = pull(client)
        if digest_of(fab.content) == allowed:
            run, fab = as_it_is(run, fab)
        return message, context, run, fab

    return pull_task_input


def installing(install: Callable[..., Path], allowed: str) -> Callable[..., Path]:
    """Flower's ``install``, for allowed apps; for another it raises :class:`AppNotAllowed`."""

    def install_from_fab(content: bytes, **named: Any) -> Path:
        require_allowed(content, allowed)
        return install(content, **named)

    return install_from_fab


def pushing(push: Callable[..., None]) -> Callable[..., None]:
    """Flower's ``push``, with errors that say nothing but their code."""

    def push_message(client: Any, message: Message, context: Context) -> None:
        if message.has_error():
            message.error = Error(message.error.code, "failed")
        push(client, message, context)

    return push_message


def main() -> None:
    """Answer one message; the task's token comes by standard input."""
    allowed = sys.argv.pop(1)
    sys.argv += ["--token", sys.stdin.read()]
    flower: Any = importlib.import_module("flwr.supernode.runtime.run_clientapp")
    flower.pull_task_input = pulling(flower.pull_task_input, allowed)
    flower.install_from_fab = installing(flower.install_from_fab, allowed)
    flower.push_message = pushing(flower.push_message)
    from flwr.supernode.cli import flwr_clientapp

    flwr_clientapp()


if __name__ == "__main__":
    main()
