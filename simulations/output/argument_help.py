"""The texts of a command's arguments, as they were declared.

Typer 0.20, the newest that Flower allows, hands a text to click's ``Argument`` in a way that
click 8.4, the oldest that huggingface_hub allows, overwrites with None.
"""

from __future__ import annotations

import inspect
from typing import Any, get_args, get_type_hints

import click
from typer.models import ArgumentInfo


def with_argument_help(command: click.Command) -> click.Command:
    """Return the command; its arguments, and those of all commands below it, have the texts of
    their ``Annotated[..., typer.Argument(help=...)]``."""
    for below in getattr(command, "commands", {}).values():
        with_argument_help(below)
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    if arguments and command.callback is not None:
        hints = get_type_hints(inspect.unwrap(command.callback), include_extras=True)
        for argument in arguments:
            argument.help = _declared(hints[str(argument.name)])
    return command


def _declared(hint: Any) -> str | None:
    """Return the text in an ``Annotated`` type, where there is one."""
    infos = (extra for extra in get_args(hint)[1:] if isinstance(extra, ArgumentInfo))
    return next((info.help for info in infos), None)
