from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from simulations.bench.engine import EngineCase, Row, of_events, table
from simulations.bench.engine_apps import on_inprocess
from simulations.bench.peak_memory import run_watched


def test_every_client_is_heard_in_every_round():
    assert len(on_inprocess(5, 9600, 3)) == 3


@pytest.mark.slow
def test_memory_is_that_of_all_processes_together(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("simulations.bench.peak_memory.SAMPLE_SECONDS", 0.1)
    grandchild = "import time; x = bytearray(150_000_000); time.sleep(5)"
    child = (
        "import subprocess, sys; "
        f"subprocess.Popen([sys.executable, '-c', {grandchild!r}], start_new_session=True).wait()"
    )
    peak = run_watched([sys.executable, "-c", child], tmp_path / "log")
    assert 150e6 < peak < 400e6


def test_a_command_that_fails_says_why(tmp_path: Path):
    with pytest.raises(RuntimeError, match=r"exit code 3[\s\S]*so it is"):
        run_watched([sys.executable, "-c", "print('so it is'); exit(3)"], tmp_path / "log")


def test_what_clients_do_is_told_from_what_the_engine_does(tmp_path: Path):
    events = [
        {"event": "client_finished", "seconds": 3.0},
        {"event": "client_finished", "seconds": 6.0},
        {"event": "round_finished", "seconds": 10.0},
        {"event": "evaluated", "seconds": 99.0},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    assert of_events(path) == ((10.0,), 0.9)


def test_engines_are_compared_pair_by_pair():
    def row(engine: str, *seconds: float) -> Row:
        return Row(EngineCase(engine, "trivial", 10, 10, 3, 100), seconds, None, 10**8)

    drawn = table([row("inprocess", 9, 1, 3), row("flower", 90, 8, 8)])
    cells = [next(iter(column.cells)) for column in drawn.columns]
    assert cells[3:7] == ["2.000", "8.000", "4.0 (4.0-4.0)", "10.0"]
