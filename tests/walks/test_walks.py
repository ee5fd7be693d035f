"""Whole afternoons of new users, as scripts: nothing on the way prints a traceback, or says nothing
for long, and each ends in time. What took how long, and was silent how long, is printed
(``pytest -s``)."""

import os
import pty
import re
import select
import subprocess
import time
from pathlib import Path

import pytest

from tests.docs.pages import commands_in
from tests.simulations.deployment.loopback import ROOT, SLOW

MINUTES = {"engineer": 10, "researcher": 10, "administrator": 10}
SILENT_SECONDS = 5


def walked(script, where):
    """The exit code of a script on a terminal, all it printed, and of each of its parts
    (``== NAME``) the longest silence in seconds."""
    folder = where / "walk"
    folder.mkdir()
    ours, theirs = pty.openpty()
    settings = {"PATH": commands_in(where / "bin"), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        ["bash", "-e", "-o", "pipefail", script],
        cwd=folder,
        env={**os.environ, **settings, "TERM": "xterm", "COLUMNS": "120"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    said, part, silences = "", "start", {"start": 0.0}
    begun = heard = time.monotonic()
    while True:
        ready = select.select([ours], [], [], 1.0)[0]
        now = time.monotonic()
        silences[part] = max(silences[part], now - heard)
        if not ready:
            continue
        try:
            chunk = os.read(ours, 65536).decode(errors="replace")
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        said, heard = said + chunk, now
        for found in re.findall(r"^== (.*?)\r?$", chunk, flags=re.MULTILINE):
            print(f"{now - begun:6.1f} s  {found}")
            part = found
            silences.setdefault(part, 0.0)
    print(f"{time.monotonic() - begun:6.1f} s  end; longest silences in s:", silences)
    os.close(ours)
    return process.wait(), said, silences


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", MINUTES)
def test_a_walk_ends_in_time_without_a_traceback(name, tmp_path):
    begun = time.monotonic()
    code, said, silences = walked(Path(__file__).parent / f"{name}.sh", tmp_path)
    took = time.monotonic() - begun
    assert code == 0, said
    assert "Traceback" not in said
    assert max(silences.values()) < SILENT_SECONDS * SLOW, silences
    assert took < 60 * MINUTES[name] * SLOW
