"""What ``deal`` says of itself: every command in every form of asking, to people and to shells."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import get_args, get_type_hints

import click
import pytest
from click.testing import CliRunner
from typer.models import ArgumentInfo, OptionInfo

from simulations import cli


def commands(command: click.Command, *names: str) -> Iterator[tuple[str, click.Command]]:
    """Every command below, with the words that call it."""
    yield " ".join(names), command
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, *names, name)


def test_help_shows_the_text_of_every_argument_and_option() -> None:
    for words, command in commands(cli.command()):
        shown = CliRunner().invoke(
            cli.command(), [*words.split(), "--help"], prog_name="deal", env={"COLUMNS": "300"}
        )
        assert shown.exit_code == 0, shown.output
        assert f"deal {words}".strip() in shown.output
        hints = get_type_hints(inspect.unwrap(command.callback or commands), include_extras=True)
        for parameter in command.params:
            extras = get_args(hints.get(str(parameter.name)))
            texts = [e.help for e in extras if isinstance(e, (ArgumentInfo, OptionInfo)) and e.help]
            assert all(text in shown.output for text in texts), (words, parameter.name)


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
    "words", [("predict", LONG, "text"), ("simulate", LONG), ("ledger", "verify", LONG)]
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
