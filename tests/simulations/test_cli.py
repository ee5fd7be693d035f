"""The command ``deal``: what it says of itself, what it refuses in one line, and how it ends."""

import errno
import inspect
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from subprocess import PIPE, STDOUT
from typing import get_args, get_type_hints

import pytest
from click.testing import CliRunner
from rich.console import Console
from typer.models import ArgumentInfo, OptionInfo

from server.folder import RunFolder
from simulations import cli
from simulations.engines import stoppable
from simulations.output import shipped_experiments, shipped_studies
from simulations.run.run_log import told_to
from tests.simulations.runs import refused


def test_a_tracker_without_its_package_is_one_line_and_nothing_starts(deal, tmp_path, monkeypatch):
    monkeypatch.setattr("server.folder.find_spec", lambda name: None)
    line = refused(deal("simulate", "quickstart", "--set", "run.track=tensorboard"))
    assert line.startswith("error: run.track = 'tensorboard' needs tensorboard")
    assert "pip install --editable '.[tensorboard]'" in line
    assert not (tmp_path / "runs").exists()


def test_a_full_disk_is_one_line():
    assert cli.closed(OSError(errno.ENOSPC, "No space left on device", "r.json")) == (
        "r.json: No space left on device; make room"
    )


def test_ls_names_every_experiment_and_study_and_its_purpose(deal):
    assert deal("--version")[1].startswith("deal ")
    code, out, _ = deal("ls")
    assert code == 0
    commands = [line.split()[:3] for line in out.splitlines()]
    assert commands == [
        *(["deal", "simulate", name] for name in shipped_experiments()),
        *(["deal", "study", name] for name in shipped_studies()),
    ]
    assert "Hospitals learn together" in out


LONG = "a" * 300
"""No file system has a file of that name."""


@pytest.mark.parametrize(
    "words", [("predict", LONG, "text"), ("simulate", LONG), ("ledger", "verify", LONG)]
)
def test_a_path_that_is_closed_is_one_line(deal, words):
    assert refused(deal(*words)).startswith(f"error: {LONG}")


def test_a_folder_that_holds_a_run(deal, tmp_path):
    folder = RunFolder(tmp_path / "runs" / "quickstart-seed0")
    folder.path.mkdir(parents=True)
    folder.results.touch()
    assert "already holds a run" in refused(deal("simulate", "quickstart"))
    assert "no checkpoint" in refused(deal("simulate", "quickstart", "--resume"))


FINISHED = """
import sys
from simulations.start import main

try:
    main()
finally:
    print("torch" in sys.modules)
"""


def test_what_is_finished_is_not_resumed_and_compared_before_anything_large_loads(
    examples, tmp_path
):
    runs = [str(shutil.copytree(examples / "plain", tmp_path / name)) for name in ("one", "two")]
    again = ["simulate", f"{runs[0]}/experiment.toml", "--out", runs[0], "--resume"]
    for words in (again, ["compare", *runs]):
        command = [sys.executable, "-c", FINISHED, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        *said, last = done.stdout.splitlines()
        assert last == "False"
        if words is again:
            assert said == [f"{runs[0]}: the run has finished, nothing is left to do"]


def test_ctrl_c_is_one_line_from_the_first_moment_on(tmp_path):
    command = [sys.executable, "-m", "simulations.start", "simulate", "quickstart"]
    for moment in (0.3, 0.9):
        with subprocess.Popen(command, cwd=tmp_path, stdout=PIPE, stderr=STDOUT, text=True) as run:
            time.sleep(moment)
            run.send_signal(signal.SIGINT)
            said, _ = run.communicate(timeout=60)
        assert run.returncode == 130
        assert "Traceback" not in said
        assert "stop" in said


SWALLOWING = """
import signal
import time

from simulations.start import stopped

signal.signal(signal.SIGINT, stopped)
try:
    signal.raise_signal(signal.SIGINT)
except BaseException:
    time.sleep(120)
"""


def test_ctrl_c_ends_what_a_library_swallows():
    run = subprocess.run([sys.executable, "-c", SWALLOWING], capture_output=True, timeout=30)
    assert run.returncode == 130
    assert run.stderr == b"stopped\n"


def test_a_signal_that_a_library_swallows_stops_a_run_at_its_next_event():
    """A loader of models has done so; the last event of a run is written all the same."""
    listen = told_to(Console(), lambda *what: None)
    with stoppable("the clients end"):
        listen({"event": "own"})
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            listen({"event": "own"})
        listen({"event": "run_stopped", "reason": "KeyboardInterrupt: "})
    with stoppable("the clients end"):
        listen({"event": "own"})


def words(out, *settings):
    """Of a small run."""
    small = ("data.max_test=8", "train.max_length=16", "run.threads=1", *settings)
    own = [part for setting in small for part in ("--set", setting)]
    return ["simulate", "quickstart", "--out", str(out), *own]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("simulate own.toml", "own.toml: no such file"),
        ("simulate quickstart --engine ray", "unknown run.engine 'ray'"),
        ("study medmqca", "did you mean 'medmcqa'"),
        ("study medmcqa --seeds x", "write whole numbers"),
        ("study clinc10", "needs data.path"),
    ],
)
def test_what_is_wrong_is_one_line_and_starts_nothing(deal, tmp_path, typed, message):
    assert message in refused(deal(*typed.split()))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("number", "workers"),
    [pytest.param(signal.SIGINT, 2, marks=pytest.mark.slow), (signal.SIGTERM, 1)],
)
def test_a_signal_stops_with_a_checkpoint_and_says_how_to_go_on(fork, tmp_path, number, workers):
    out = tmp_path / "run"
    settings = ("data.max_train=16", "federation.rounds=50", f"run.workers={workers}")
    arguments = words(out, *settings)
    process, deadline = fork("simulations.cli", *arguments), time.monotonic() + 120
    files = (RunFolder(out).checkpoint, RunFolder(out).metrics)
    while not all(file.exists() for file in files) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(number)
    stdout, stderr = process.communicate()
    assert process.returncode == 130, stderr
    assert "Traceback" not in stdout + stderr
    assert f"stopped; the checkpoint is in {out}; continue with" in stdout
    assert stdout.splitlines()[-1].strip() == f"deal {' '.join(arguments)} --resume"
    assert f"report              {out / 'report.html'}" in stdout
    assert "The run stopped early" in (out / "report.html").read_text(encoding="utf-8")


def commands(command, *names):
    """Every command below, with the words that call it."""
    yield " ".join(names), command
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, *names, name)


def test_help_shows_the_text_of_every_argument_and_option():
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


def completed(typed):
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


def test_shells_complete_commands_and_the_names_of_what_is_shipped():
    assert {"simulate", "study", "submit"} <= set(completed("deal s"))
    assert completed("deal simulate quick") == ["quickstart", "quickstart-llm"]
