"""The reference of the commands, made from the command line itself.

``python -m simulations.command_reference`` prints the page.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from simulations import cli
from simulations.output.files import row

INTRODUCTION = """\
# Commands

This page is made from the command line itself.

`deal COMMAND --help` says the same. The exit code is 0 where a command has done what it is for,
2 where what was typed, or a file that it names, is wrong, or a run cannot go on (one line says
what, where, and the cure); 1 where a run of a study has failed, an audit has refuted
a claim, or the program has a fault; 130 where it was interrupted.
"""
LEFT_OUT = {"help", "install_completion", "show_completion"}
"""Options that every command line of this kind has."""


def commands_page() -> str:
    """Return the page."""
    found = list(leaves(click.Context(cli.command(), info_name="deal")))
    lines = [INTRODUCTION, "| command | does |", "|---|---|"]
    for context in found:
        words = context.command_path
        lines.append(row(f"[`{words}`](#{words.replace(' ', '-')})", _summary(context.command)))
    for context in found:
        lines += ["", *_section(context)]
    return "\n".join(lines) + "\n"


def leaves(context: click.Context) -> Iterator[click.Context]:
    """Yield the context of every command below one that does something itself.

    Args:
        context: of ``deal``, or of a group in it.
    """
    command = context.command
    if not isinstance(command, click.Group):
        yield context
        return
    for name in sorted(command.commands):
        below = command.commands[name]
        if not below.hidden:
            yield from leaves(click.Context(below, parent=context, info_name=name))


def _section(context: click.Context) -> Iterator[str]:
    """Yield the lines about one command."""
    yield f"## {context.command_path}"
    yield ""
    yield _text(context.command)
    parameters = [p for p in context.command.params if p.name not in LEFT_OUT]
    if not parameters:
        return
    yield ""
    yield "| argument, option | default | meaning |"
    yield "|---|---|---|"
    for parameter in sorted(parameters, key=lambda p: isinstance(p, click.Option)):
        meaning = str(getattr(parameter, "help", "") or "")
        yield row(f"`{_name(parameter, context)}`", _default(parameter), meaning)


def _text(command: click.Command) -> str:
    """Return what a command says of itself, on one line, with names as Markdown code."""
    return re.sub(r"``(.+?)``", r"`\1`", " ".join(inspect.cleandoc(command.help or "").split()))


def _summary(command: click.Command) -> str:
    """Return the first sentence of it."""
    return re.split(r"(?<=\.)\s", _text(command))[0]


def _name(parameter: click.Parameter, context: click.Context) -> str:
    """Return how a parameter is typed: ``--out TEXT``, or ``EXPERIMENT``."""
    metavar = parameter.make_metavar(context)
    if not isinstance(parameter, click.Option):
        return metavar
    names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    return names if parameter.is_flag else f"{names} {metavar.split()[0]}"


def _default(parameter: click.Parameter) -> str:
    """Return its default; empty where there is none, or where its text has it."""
    if parameter.required:
        return "needed"
    default = parameter.default
    if isinstance(parameter, click.Option) and parameter.is_flag:
        return f"`{parameter.opts[0]}`" if default is True else ""
    return f"`{default}`" if isinstance(default, (int, float, str, Path)) and default != "" else ""


if __name__ == "__main__":
    sys.stdout.write(commands_page())
