"""The command ``deal``: what it says of itself, what it refuses in one line, and how it ends."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from subprocess import PIPE, STDOUT

import psutil
import pytest

from server.folder import RunFolder
from simulations import cli
from simulations.output import shipped_experiments, shipped_studies
from tests.simulations.report.html_page import EXAMPLES

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def deal(tmp_path, monkeypatch, capsys):
    """Call the entry point in an empty folder; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["deal", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


def refused(result):
    """The one line of a refusal, the last one."""
    code, out, err = result
    assert code == 2, err
    assert "Traceback" not in out + err
    *said, line = err.splitlines()
    assert line.startswith("error: ")
    assert not any("error" in other for other in said)
    return line


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


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (("quickstrat",), "did you mean 'quickstart'"),
        (("own.toml",), "own.toml: no such file"),
        (("quickstart", "--set", "adapter.rnk=4"), "unknown key 'adapter.rnk'; did you mean"),
        (("quickstart", "--set", "adapter"), "write it as table.key=value"),
        (("quickstart", "--engine", "ray"), "unknown run.engine 'ray'"),
        (("quickstart", "--set", "data.source=files"), "needs data.path"),
    ],
)
def test_what_is_wrong_is_one_line(deal, typed, message):
    assert message in refused(deal("simulate", *typed))


FINISHED = """
import sys
from simulations.start import main

try:
    main()
finally:
    print("torch" in sys.modules)
"""


def test_a_finished_run_is_not_resumed_and_says_so_before_anything_large_loads(tmp_path):
    folder = shutil.copytree(EXAMPLES / "plain", tmp_path / "run")
    RunFolder(folder).checkpoint.touch()
    arguments = ["simulate", str(folder / "experiment.toml"), "--out", str(folder), "--resume"]
    command = [sys.executable, "-c", FINISHED, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = f"{folder}: the run has finished, nothing is left to do"
    assert done.stdout.splitlines() == [said, "False"]


def test_finished_runs_are_compared_without_what_is_large(tmp_path):
    runs = [str(shutil.copytree(EXAMPLES / "plain", tmp_path / name)) for name in ("one", "two")]
    command = [sys.executable, "-c", FINISHED, "compare", *runs]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


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


def words(out, *settings):
    """Of a small run."""
    small = ("data.max_test=8", "train.max_length=16", "run.threads=1", *settings)
    own = [part for setting in small for part in ("--set", setting)]
    return ["simulate", "quickstart", "--out", str(out), *own]


HALTING = """
import os
import signal

from server.folder import EventLog
from simulations.cli import main

write = EventLog.write


def halting(log, event, **fields):
    write(log, event, **fields)
    if event == "run_started":
        os.kill(os.getpid(), signal.SIGSTOP)


EventLog.write = halting
main()
"""


def test_a_run_is_continued_by_one_process_at_a_time(deal, fork, tmp_path):
    """Another one is refused while it lives, however slow it is, and not when it was killed."""
    out, script = tmp_path / "run", tmp_path / "halting.py"
    script.write_text(HALTING)
    one = ('data.tasks=["surgery"]', "federation.rounds=1", "federation.clients=2")
    arguments = words(out, *one, "data.max_train=8", "run.workers=1")
    process = fork(str(script), *arguments)
    try:
        while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
            assert process.poll() is None, process.stderr
            time.sleep(0.05)
        before = RunFolder(out).metrics.read_bytes()
        line = refused(deal(*arguments, "--resume"))
        assert f"{out}: another process is writing this run" in line
        assert RunFolder(out).metrics.read_bytes() == before
    finally:
        process.kill()
        process.communicate()
    code, _, err = deal(*arguments, "--resume")
    assert code == 0, err
    assert RunFolder(out).results.exists()


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
