"""Each command of the pages is run, or at least read by the real command line (covered.py)."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main

from deal_core.config.experiment import Experiment
from deal_core.config.file import apply_overrides, parse_experiment, read_toml
from simulations import cli
from simulations.run.shipped import shipped_experiments
from simulations.study.study_file import load_study
from tests.docs import prepared
from tests.docs.commands import LANGUAGES, Command, commands, commands_of
from tests.docs.covered import ELSEWHERE, FAST, NOT_OURS, PARSED, SLOW
from tests.docs.pages import PAGES, ROOT, Fence, fences

TUTORIAL = "docs/tutorial.md:"
TABLES = (FAST, SLOW, ELSEWHERE, PARSED, NOT_OURS)
COMMANDS = commands()
DEAL = cli.command()
OF_DEAL = sorted({command.text for command in COMMANDS if command.words[0] == "deal"})
PROGRAMS = {"deal", "git", "make", "pip", "python", "python3", "flwr", "docker", "cd", "export"}


def uncovered(found: list[Command]) -> list[str]:
    return [
        f"{command.place}: {command.text}"
        for command in found
        if not command.place.startswith(TUTORIAL)
        and not any(command.text in table for table in TABLES)
    ]


def test_every_command_is_covered() -> None:
    assert len(COMMANDS) > 90
    assert uncovered(COMMANDS) == [], "say in tests/docs/covered.py how it is tested"


def test_nothing_is_covered_that_no_page_has_nor_twice() -> None:
    known = Counter(text for table in TABLES for text in table)
    assert [text for text, count in known.items() if count > 1] == []
    assert known.keys() - {command.text for command in COMMANDS} == set()


def test_a_block_of_commands_is_marked_as_one() -> None:
    unmarked = [
        f"{block.page.name}:{block.line}: {line}"
        for page in PAGES
        for block in fences(page)
        if block.language not in LANGUAGES
        for line in block.text.splitlines()
        if re.match(r"(\$ |\.venv/bin/)?(deal|pip|flwr|make|git clone|docker) ", line)
    ]
    assert unmarked == []


def test_a_command_that_is_in_no_table_is_seen() -> None:
    text = "make test && deal nothing \\\n  --at-all  # yes\ncat > x <<'END'\ndeal ls\nEND\n"
    found = list(commands_of(Fence(ROOT / "README.md", "bash", text, 7)))
    assert [command.text for command in found] == [
        "make test",
        "deal nothing --at-all",
        "cat '>' x",
    ]
    assert uncovered(found) == ["README.md:7: deal nothing --at-all", "README.md:7: cat '>' x"]


def parse(command: click.Command, words: tuple[str, ...]) -> dict[str, Any]:
    """What a command line says to the command that it ends in; a wrong one is a UsageError."""
    program, *rest = words
    while isinstance(command, click.Group):
        command = command.commands[rest.pop(0)]
    return command.make_context(program, rest).params


@pytest.mark.parametrize("text", OF_DEAL)
def test_the_real_command_line_takes_it(text: str) -> None:
    parameters = parse(DEAL, tuple(shlex.split(text)))
    tables = {}
    if experiment := parameters.get("experiment"):
        own = str(experiment).endswith(".toml")  # a file of the reader's
        tables = {} if own else read_toml(shipped_experiments()[experiment])
    parse_experiment(apply_overrides(tables, parameters.get("overrides") or ()), "--set")
    if "study" in parameters:
        file = load_study(parameters["study"], budgets=parameters["epsilon"]).file
        only = [each.partition(".")[0] for each in parameters["only"].split(",") if each]
        assert set(only) <= file.arms.keys()


@pytest.mark.parametrize(
    "words", ["deal simulate", "deal simulate quickstart --sett a=b", "deal study x --jobs -1"]
)
def test_the_real_command_line_refuses_what_is_wrong(words: str) -> None:
    with pytest.raises(click.UsageError):
        parse(DEAL, tuple(shlex.split(words)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # typer's, of Flower's options
def test_flower_takes_its_command() -> None:
    from flwr.cli.app import app

    command = typer.main.get_command(app)
    (text,) = [text for text in PARSED if text.startswith("flwr ")]
    assert parse(command, tuple(shlex.split(text)))["stream"] is True


def test_commands_in_a_sentence_exist() -> None:
    """``deal site start DIR`` in running text: its words and its options."""
    unknown = []
    for page in PAGES:
        for text in re.findall(r"(?<!`)`(deal [a-z][^`]*)`", page.read_text(encoding="utf-8")):
            command: click.Command = DEAL
            words = text.replace("\n", " ").split()[1:]
            while isinstance(command, click.Group) and words:
                command = command.commands.get(words.pop(0), click.Command("unknown"))
            options = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
            if command.name == "unknown" or not {
                word.partition("=")[0] for word in words if word.startswith("--")
            } <= options | {"--help"}:
                unknown.append(f"{page.name}: {text}")
    assert unknown == []


def test_a_test_that_is_named_is_there() -> None:
    for path, name in ELSEWHERE.values():
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for reason in (*PARSED.values(), *NOT_OURS.values()):
        for path in re.findall(r"tests/[\w/.]+\w", reason):
            assert (ROOT / path).exists()


def test_what_other_programs_are_given_is_there() -> None:
    rules = (ROOT / "Makefile").read_text()
    for text in NOT_OURS:
        program, *words = shlex.split(text)
        if program == "make":
            assert re.search(rf"^{words[0]}:", rules, re.MULTILINE)
        for option, value in pairwise(words):
            if option in ("-r", "-f"):
                assert (ROOT / value).is_file()


def save(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.mark.filterwarnings("ignore")  # as in a shell
def test_fast_commands_do_what_they_are_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    make_experiment: Callable[..., Experiment],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    prepared.own_rows(tmp_path)
    prepared.finished_runs(tmp_path, make_experiment("federation.rounds=1"))
    prepared.institutions(tmp_path)
    prepared.benchmark(tmp_path, save)
    save(tmp_path / "texts.jsonl", "")
    (tmp_path / "texts.csv").write_text("question\nspinal block\nwhich drug?\n")
    for text, expected in FAST.items():
        shutil.rmtree("mine", ignore_errors=True)
        capsys.readouterr()
        code = prepared.call([prepared.below(word) for word in shlex.split(text)], monkeypatch)
        captured = capsys.readouterr()
        assert code == 0, f"{text}\n{captured.out}{captured.err}"
        assert expected in captured.out or (tmp_path / expected).exists(), text
        if (tmp_path / "server/ca.crt").exists():
            shutil.copy("server/ca.crt", "ca.crt")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")  # as in a shell
def test_long_commands_do_what_they_are_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    prepared.own_rows(tmp_path)
    begun = "deal simulate my.toml --out runs/mine"
    assert prepared.call(shlex.split(begun), monkeypatch) == 0
    wrong: list[str] = []
    for text, smaller in SLOW.items():
        capsys.readouterr()
        words = [*shlex.split(text), *shlex.split(smaller, posix=False)]
        verb, name = words[1:3]
        if verb in ("simulate", "audit"):  # the page has it more than once, with other settings
            again = f"{name}-seed0" if verb == "simulate" else f"audit-{name}"
            shutil.rmtree(tmp_path / "runs" / again, ignore_errors=True)
        code = prepared.call(words, monkeypatch)
        captured = capsys.readouterr()
        told = "target_modules = " if verb == "layers" else "report"
        if code != 0 or told not in captured.out:
            wrong.append(f"{shlex.join(words)}\n{captured.out}{captured.err}")
    assert wrong == []
