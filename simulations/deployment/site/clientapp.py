"""``python -m simulations.deployment.site.clientapp DIGEST ...``: Flower's process for one
message, which looks at the app's bytes before it unpacks them.

The SuperNode has looked already; this holds also where it has not. What the server claims of the
app, its name, version and hash, is replaced by what the bytes say, since Flower makes a path of it.
An error that leaves carries no text: Flower would send that of an exception.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message
from flwr.common.config import get_fab_config, get_metadata_from_config
from flwr.supercore.fab import Fab
from flwr.supercore.run import Run

from simulations.deployment.site.own_app import digest_of, require_allowed

TaskInput = tuple[Message, Context, Run, Fab]


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
