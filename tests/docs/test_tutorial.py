"""docs/tutorial.md: its commands, pasted into a shell, from an empty folder to a report in under
five minutes, and on to the last line."""

import os
import subprocess
import time

import pytest

from server.results import read_results
from tests.docs.pages import ROOT, SHELL, commands_in, fences

BLOCKS = list(fences(ROOT / "docs/tutorial.md"))
PASTED = "\n".join(block.text for block in BLOCKS if block.language in SHELL)
REPORT = "deal report runs/mine --labels\n"
TO_THE_REPORT, AFTER_IT = PASTED.split(REPORT)
(CHECKED,) = (block.text for block in BLOCKS if block.language not in SHELL)
SECONDS = 300


@pytest.fixture
def path(tmp_path):
    return commands_in(tmp_path / "bin")


def paste(commands, where, path):
    """What a shell says that is given the commands; the first fault ends it."""
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail"],
        input=commands,
        cwd=where,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(4 * SECONDS)
def test_from_an_empty_folder_to_a_report(tmp_path, path):
    empty = tmp_path / "empty"
    empty.mkdir()
    begun = time.monotonic()
    told = paste(TO_THE_REPORT + REPORT, empty, path)
    took = time.monotonic() - begun
    assert took < SECONDS
    assert CHECKED in told
    runs = empty / "tutorial/runs"
    assert "Task-IL accuracy" in (runs / "mine/report.html").read_text(encoding="utf-8")
    assert (runs / "mine/labels.json").is_file()
    told = paste(AFTER_IT, empty / "tutorial", path)
    assert "Settings that differ" in told
    assert (empty / "tutorial/mine/adapter_config.json").is_file()
    assert "Pathology" in told
    learnt = read_results(runs / "mine")
    zero_shot = sum(learnt.zero_shot.values()) / len(learnt.zero_shot)
    assert learnt.average_accuracy > zero_shot
    assert learnt.average_accuracy > read_results(runs / "sequential").average_accuracy
    assert "0.001 per record" in " ".join(told.split())
    assert read_results(runs / "private").privacy.delta == 0.001
