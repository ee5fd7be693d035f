"""``deal demo deployment`` for real: three times in a row, and cut short in three ways."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from server.results import read_results
from simulations.deployment.demo import MARK
from simulations.engines.flower import members
from tests.simulations.deployment.loopback import DEAL, ROOT, SLOW, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800 * SLOW)]


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*DEAL, "demo", "deployment", "--dir", str(folder), *options],
        cwd=folder.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def running(folder: Path) -> list[psutil.Process]:
    return members(folder, MARK)


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def events(folder: Path) -> list[str]:
    logs = folder.glob("server/runs/*/metrics.jsonl")
    found = [line for log in logs for line in log.read_text().splitlines(keepends=True)]
    return [str(json.loads(line)["event"]) for line in found if line.endswith("\n")]


def test_three_times_in_a_row_and_all_processes_are_gone_after_each(tmp_path: Path) -> None:
    for number in range(3):
        folder = tmp_path / f"demo{number}"
        before = time.monotonic()
        process = start(folder, "--sites", "3" if number == 0 else "2")
        seen = wait_for("processes", lambda folder=folder: running(folder), 120)  # type: ignore[misc]
        said, _ = process.communicate(timeout=900 * SLOW)
        assert process.returncode == 0, said
        seconds = time.monotonic() - before
        print(f"run {number}: {seconds:.0f} s")
        assert seconds < 300 * SLOW
        assert running(folder) == []
        assert all(gone(each) for each in seen)
        results = read_results(next(folder.glob("server/runs/*")))
        assert results.engine == "deployment"
        assert results.average_accuracy is not None
        assert results.average_accuracy > sum(results.zero_shot.values()) / len(results.zero_shot)
        assert "average accuracy" in said
        assert "no process is left" in said
        assert len(list(folder.glob("server/runs/*/report.html"))) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["server", "run_started"])
def test_a_signal_stops_all_of_it(tmp_path: Path, number: int, moment: str) -> None:
    folder = tmp_path / "demo"
    process = start(folder, "--sites", "2")
    reached = {
        "server": lambda: bool(running(folder)),
        "run_started": lambda: "run_started" in events(folder),
    }
    wait_for(moment, reached[moment], 240)
    seen = running(folder)
    process.send_signal(number)
    said, _ = process.communicate(timeout=120 * SLOW)
    assert process.returncode == 130, said
    assert "nothing of it runs any more" in said
    assert seen
    assert running(folder) == []


def test_a_site_that_dies_ends_it_with_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    process = start(folder, "--sites", "2")
    wait_for("the run", lambda: "run_started" in events(folder), 240)
    (pid,) = folder.glob("sites/north/state/site.pid")
    os.kill(int(pid.read_text()), signal.SIGKILL)
    said, _ = process.communicate(timeout=120 * SLOW)
    assert process.returncode == 2, said
    assert "error: 'north' has ended by itself" in said
    assert running(folder) == []
