"""What ``deal`` says of itself: every command in every form of asking, to people and to shells."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import click
import pytest
from click.testing import CliRunner
from typer.models import ArgumentInfo

from simulations import cli

WITHOUT_TEXT = {"server add-site name", "server add-site key", "server remove-site name"} | {
    "stop run"
}
"""Arguments that declare no text."""


def commands(command: click.Command, *names: str) -> Iterator[tuple[str, click.Command]]:
    """Every command below, with the words that call it."""
    yield " ".join(names), command
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, *names, name)


COMMANDS = dict(commands(cli.command()))


def declared(command: click.Command) -> dict[str, str]:
    """Argument to the text that it was declared with; empty where there is none."""
    function = inspect.unwrap(command.callback) if command.callback else lambda: None
    hints: dict[str, Any] = get_type_hints(function, include_extras=True)
    texts = {}
    for argument in command.params:
        if isinstance(argument, click.Argument):
            hint = hints[str(argument.name)]
            extras = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
            found = [extra.help for extra in extras if isinstance(extra, ArgumentInfo)]
            texts[str(argument.name)] = (found[0] if found else None) or ""
    return texts


def shown(words: str, flag: str) -> str:
    result = CliRunner().invoke(
        cli.command(), [*words.split(), flag], prog_name="deal", env={"COLUMNS": "300"}
    )
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("words", COMMANDS)
def test_help_shows_the_text_of_every_argument_and_option(words: str) -> None:
    text = shown(words, "--help")
    assert f"deal {words}".strip() in text
    for parameter in COMMANDS[words].params:
        if isinstance(parameter, click.Option) and parameter.help:
            assert parameter.help in text
    for argument, help_text in declared(COMMANDS[words]).items():
        assert help_text in text
        assert bool(help_text) == (f"{words} {argument}" not in WITHOUT_TEXT)


def completed(typed: str) -> list[str]:
    """What bash is offered for the last of the words typed."""
    words = typed.split(" ")
    asked = {
        "_DEAL_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(words) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-c", "from simulations.cli import main; main()"],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_shells_complete_commands_and_the_names_of_what_is_shipped() -> None:
    assert {"simulate", "study", "submit"} <= set(completed("deal s"))
    assert completed("deal simulate quick") == ["quickstart", "quickstart-llm"]


LONG = "a" * 300
"""No file system has a file of that name."""


@pytest.mark.parametrize(
    "words", [("predict", LONG, "text"), ("simulate", LONG), ("ledger", "show", LONG)]
)
def test_a_path_that_is_closed_is_one_line(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["deal", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith(f"error: {LONG}")
    assert said.count("\n") == 1
