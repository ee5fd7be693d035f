"""Commands of the pages: the real command line takes each."""

import os
import re
import shlex
import subprocess
import sys
import tomllib

import click

from client.site_file import read_site
from deal_core.config.file import apply_overrides, parse_experiment, read_toml
from simulations import cli
from simulations.deployment.server.folder import ServerFolder
from simulations.deployment.site.check import check_site
from simulations.output import shipped_experiments
from simulations.run.experiment import Request, load_experiment
from simulations.study.grid import load_study
from tests.docs.pages import PAGES, ROOT, commands, fences

COMMANDS = commands()
DEAL = cli.command()


def wrong_settings(words):
    """What the command line says against a ``deal``, its names and settings; empty: nothing."""
    command, (program, *rest) = DEAL, words
    try:
        while isinstance(command, click.Group):
            command = command.commands[rest.pop(0)]
        given = command.make_context(program, rest).params
        tables = {}
        if experiment := given.get("experiment"):
            own = str(experiment).endswith(".toml")  # a file of the reader's
            tables = {} if own else read_toml(shipped_experiments()[experiment])
        parse_experiment(apply_overrides(tables, given.get("overrides") or ()), "--set")
        if "study" in given:
            arms = load_study(given["study"], budgets=given["epsilon"]).file.arms
            only = {each.partition(".")[0] for each in given["only"].split(",") if each}
            return "" if only <= arms.keys() else f"no such arm: {only - arms.keys()}"
    except (Exception, SystemExit) as error:  # of any kind
        return f"{type(error).__name__}: {error}"
    return ""


def test_the_real_command_line_takes_every_command():
    assert len(COMMANDS) > 80
    found = {text: wrong_settings(shlex.split(text)) for text in COMMANDS if text[:5] == "deal "}
    assert {text: said for text, said in found.items() if said} == {}
    for words in ("deal simulate", "deal simulate quickstart --sett a=b", "deal nothing"):
        assert wrong_settings(words.split()) != ""
    targets = {text.split()[1] for text in COMMANDS if text.startswith("make ")}
    assert targets <= {*re.findall(r"^(\S+):", (ROOT / "Makefile").read_text(), re.MULTILINE)}


def test_extras_that_pages_install_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"editable '\.\[(\w+)\]'", text))
    assert {"notebook", "tensorboard"} <= named <= project["optional-dependencies"].keys()


def test_commands_in_a_sentence_exist():
    """``deal site start DIR`` in running text: its words and its options."""
    unknown = []
    for page in PAGES:
        for text in re.findall(r"(?<!`)`(deal [a-z][^`]*)`", page.read_text(encoding="utf-8")):
            command = DEAL
            words = text.replace("\n", " ").split()[1:]
            while isinstance(command, click.Group) and words:
                command = command.commands.get(words.pop(0), click.Command("unknown"))
            options = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
            if command.name == "unknown" or not {
                word.partition("=")[0] for word in words if word.startswith("--")
            } <= options | {"--help"}:
                unknown.append(f"{page.name}: {text}")
    assert unknown == []


def test_what_the_page_makes_on_one_machine_is_ready(tmp_path):
    """Without a proxy: its sites have the address that the server listens on."""
    blocks = fences(ROOT / "docs/DEPLOYMENT.md")
    (block,) = [each.text for each in blocks if each.text.startswith("mkdir -p one/")]
    deal = f'deal() {{ "{sys.executable}" -m simulations.cli "$@"; }}\n'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        ["bash", "-e", "-c", deal + block], cwd=tmp_path, env=environment, check=True, timeout=240
    )
    experiment = load_experiment(Request(str(tmp_path / "one/triage.toml")))
    settings = ServerFolder(tmp_path / "one/server").settings()
    for name in ("north", "south"):
        site = tmp_path / "one" / name
        report = check_site(site, experiment, offline=True)
        assert (report.problems, report.warnings) == ([], [])
        assert read_site(site / "site.toml").server.address == settings.local_address
