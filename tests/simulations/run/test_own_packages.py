"""Another package called server or client is one clear line, before anything starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deal_core.errors import UserError
from simulations.run.shipped import PACKAGES, ROOT, require_own_packages


def test_here_they_are_our_own() -> None:
    require_own_packages()


def test_one_that_lies_elsewhere_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the name 'deal_core' means .*deal_core here, and not"):
        require_own_packages(tmp_path)


@pytest.mark.parametrize("name", [name for name in PACKAGES if name != "deal_core"])
@pytest.mark.parametrize("form", ["package", "module"])
def test_the_command_says_which_package_is_in_the_way(tmp_path: Path, name: str, form: str) -> None:
    other = tmp_path / name / "__init__.py" if form == "package" else tmp_path / f"{name}.py"
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
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    place = tmp_path / name if form == "package" else other
    assert line.startswith(f"error: the name '{name}' means {place} here, and not {ROOT / name};")
