"""Another package called server or client is one clear line, before anything starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deal_core.installed import ROOT, require_own_packages


def test_here_they_are_our_own() -> None:
    require_own_packages()


@pytest.mark.parametrize("place", ["server/__init__.py", "client.py"])
def test_the_command_says_which_package_is_in_the_way(tmp_path: Path, place: str) -> None:
    name, other = place.partition("/")[0], tmp_path / place
    other.parent.mkdir(exist_ok=True)
    other.write_text("raise SystemExit('imported')\n")
    done = subprocess.run(
        [sys.executable, "-m", "simulations.cli", "ls"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    stem = name.removesuffix(".py")
    assert line.startswith(f"error: the name '{stem}' means {tmp_path / name} here, and not ")
