"""Commands of the pages: the real command line takes each, and those of two tables are run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import pytest

from client.site_file import read_site
from deal_core.config.experiment import Experiment
from deal_core.config.file import apply_overrides, parse_experiment, read_toml
from deal_core.privacy.ledger import Budget, Ledger
from simulations import cli
from simulations.deployment.server.folder import ServerFolder
from simulations.deployment.site.check import check_site
from simulations.engines.inprocess import run_inprocess
from simulations.run.experiment import Request, load_experiment
from simulations.run.shipped import shipped_experiments
from simulations.study.study_file import load_study
from tests.docs.pages import PAGES, ROOT, commands, fences
from tests.ledger_events import ledger_event
from tests.simulations.runs import at

COMMANDS = commands()
DEAL = cli.command()
FAST = {
    "deal ls": "deal simulate quickstart",
    "deal check my.toml --set data.split=0.2 --strict": "nothing is wrong",
    "deal check private": "nothing is wrong",
    "deal report runs/quickstart-seed0 --labels": "runs/quickstart-seed0/labels.json",
    "deal report /srv/deal/runs/RUN": "runs/mine/report.html",
    "deal compare runs/quickstart-seed0 runs/mine": "Accuracies in %",
    "deal predict runs/quickstart-seed0 'Which drug reverses heparin?'": '"label":',
    "deal predict runs/quickstart-seed0 --file texts.csv --column question --task surgery": (
        '"row": 2'
    ),
    "deal predict /srv/deal-site/state/runs/RUN/adapter 'a text'": '"text": "a text"',
    "deal export runs/quickstart-seed0 --to mine": "mine/adapter_config.json",
    "deal ledger show STATE": "epsilon",
    "deal ledger export STATE --out c.json": "c.json",
    "deal ledger verify STATE --certificate c.json": "certificate",
    "deal report --privacy /srv/deal-site/state": "STATE/privacy.html",
    "deal server init /srv/deal --host federation.example.org --host 192.0.2.7": "server/ca.crt",
    "deal site init /srv/deal-site --name north --data /srv/data "
    "--server federation.example.org:9443 --certificate ca.crt --experiment two-tasks.toml": (
        "site/site.toml"
    ),
    "deal data import-cl-benchmark CL_Benchmark --out tasks": "tasks",
}
"""Command to what it says, or the file that it leaves: run in a prepared folder."""
SMALL = (
    "--set data.max_train=24 --set data.max_test=8 --set federation.rounds=1 --set run.threads=1 "
    """--set run.workers=1 --set data.tasks=["laboratory","surgery"]"""
)
SLOW = {
    "deal simulate quickstart": SMALL,
    "deal simulate private": SMALL,
    "deal study medmcqa --only 'deal.*,lwf.*'": f"{SMALL} --seeds 0 --jobs 1",
    "deal study private --epsilon 1,8,inf": f"{SMALL} --seeds 0 --epsilon 8 --jobs 1",
    "deal audit private-site --epsilon 8": f"{SMALL} --canaries 40 --repetitions 1 --epsilon 8",
}
"""Command to what makes it small."""
PLACES = {
    "/srv/deal/runs/RUN": "runs/mine",
    "/srv/deal-site/state/runs/RUN/adapter": "runs/quickstart-seed0",
    "/srv/deal-site/state": "STATE",
    "/srv/deal-site": "site",
    "/srv/deal": "server",
    "/srv/data": "data",
}
"""Absolute paths of the pages to places below the prepared folder."""


def wrong_settings(words: Sequence[str]) -> str:
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


def test_the_real_command_line_takes_every_command() -> None:
    assert len(COMMANDS) > 80
    assert {*FAST, *SLOW} <= {*COMMANDS}
    found = {text: wrong_settings(shlex.split(text)) for text in COMMANDS if text[:5] == "deal "}
    assert {text: said for text, said in found.items() if said} == {}
    for words in ("deal simulate", "deal simulate quickstart --sett a=b", "deal nothing"):
        assert wrong_settings(words.split()) != ""
    targets = {text.split()[1] for text in COMMANDS if text.startswith("make ")}
    assert targets <= {*re.findall(r"^(\S+):", (ROOT / "Makefile").read_text(), re.MULTILINE)}


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


def call(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Call ``deal`` in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", [PLACES.get(word, word) for word in words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def prepare(folder: Path, experiment: Experiment) -> None:
    """What the pages name: rows and settings of a reader, finished runs, an institution's files."""
    (tutorial,) = (b.text for b in fences(ROOT / "docs/tutorial.md") if "> my.toml" in b.text)
    (folder / "my.toml").write_text(tutorial.partition("<<'END'\n")[2].partition("\nEND\n")[0])
    for task, labels in (("laboratory", "ab"), ("head-and-neck", "cd")):
        (folder / "data" / task).mkdir(parents=True)
        rows = [f"{task} case {n},{labels[n % 2]}" for n in range(100)]
        (folder / "data" / task / "train.csv").write_text("\n".join(["text,label", *rows, ""]))
    first = folder / "runs/quickstart-seed0"
    run_inprocess(at(experiment, first), lambda event: None)
    shutil.copytree(first, folder / "runs" / "mine")
    blocks = fences(ROOT / "docs/DEPLOYMENT.md")
    (shown,) = (b.text for b in blocks if b.text.startswith('description = "Two tasks'))
    (folder / "two-tasks.toml").write_text(shown)
    Ledger(folder / "STATE").charge(ledger_event(), Budget(100.0, 1e-4), "r1", b"x")
    benchmark = folder / "CL_Benchmark/TC/agnews"
    benchmark.mkdir(parents=True)
    news = [{"label": "World", "sentence": "They voted."}, {"label": "Sports", "sentence": "Won."}]
    for name, value in (
        ("train", news),
        ("dev", news),
        ("test", news),
        ("labels", ["World", "Sports"]),
    ):
        (benchmark / f"{name}.json").write_text(json.dumps(value))
    (folder / "texts.csv").write_text("question\nspinal block\nwhich drug?\n")


@pytest.mark.filterwarnings("ignore")  # as in a shell
def test_fast_commands_do_what_they_are_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    make_experiment: Callable[..., Experiment],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    prepare(tmp_path, make_experiment("federation.rounds=1"))
    for text, expected in FAST.items():
        shutil.rmtree("mine", ignore_errors=True)
        capsys.readouterr()
        code = call(shlex.split(text), monkeypatch)
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
    for text, smaller in SLOW.items():
        capsys.readouterr()
        words = [*shlex.split(text), *shlex.split(smaller, posix=False)]
        code = call(words, monkeypatch)
        captured = capsys.readouterr()
        assert code == 0, f"{text}\n{captured.out}{captured.err}"
        assert "report" in captured.out, text


def test_what_the_page_makes_on_one_machine_is_ready(tmp_path: Path) -> None:
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
