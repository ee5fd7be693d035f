"""Who may write a run folder: one process, and no second run."""

import subprocess
import sys
from pathlib import Path

import pytest

from deal_core.errors import UserError
from deal_core.protection import make_mechanism
from server.folder import EventLog, RunFolder, exclusive_lock, read_events
from simulations.engines.inprocess import run_inprocess

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pathlib import Path
from server.folder import exclusive_lock

with exclusive_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_alone_writes_and_a_dead_one_is_in_nobodys_way(tmp_path):
    lock = RunFolder(tmp_path / "new" / "run").writing
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"run: another process is writing.*--out$"):
            exclusive_lock(lock).__enter__()
        other.kill()
    assert lock.exists()
    for _ in range(2):
        with exclusive_lock(lock):
            pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match=r"taken/run: cannot be written .*; choose another --out"):
        exclusive_lock(RunFolder(tmp_path / "taken" / "run").writing).__enter__()


def test_no_epsilon_of_a_noise_that_is_not_added(make_experiment, tmp_path):
    """Without the command line's checks: where clients take the steps no one sum has the whole
    noise, of which each adds a share."""
    private = ("privacy.mechanism=record", "privacy.noise_share=sum", "federation.clients=3")
    out = f'run.out="{tmp_path}"'
    experiment = make_experiment(out, "aggregation.secure=true", *private)
    with pytest.raises(UserError, match="only one sum has the whole noise"):
        run_inprocess(experiment, lambda event: None)
    assert not (tmp_path / "checkpoint.safetensors").exists()
    with pytest.raises(UserError, match="only one sum"):
        make_mechanism(experiment)  # what clients call before they train


def test_a_run_that_is_there_is_not_overwritten(make_experiment, tmp_path):
    results = RunFolder(tmp_path).results
    results.write_text("{}")
    with pytest.raises(UserError, match=r"already holds a run; continue it with run\.resume"):
        run_inprocess(make_experiment(f'run.out="{tmp_path}"'), lambda event: None)
    assert results.read_text() == "{}"
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_half_a_line_costs_the_event_that_it_runs_into_alone(tmp_path):
    """A full disk has cut it off, and nobody has mended the file since."""
    log = EventLog(tmp_path / "starts.jsonl")
    log.write("first")
    with log.path.open("a") as file:
        file.write('{"event": "sec')
    for name in ("second", "third"):
        log.write(name)
    assert [event["event"] for event in read_events(log.path)] == ["first", "third"]
