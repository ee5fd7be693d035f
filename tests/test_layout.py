"""The top level: whose packages are imported, and what the command loads."""

import ast
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deal_core.installed import require_own_packages

ROOT = Path(__file__).parents[1]
PACKAGES = ("server", "client", "deal_core", "simulations")
HEAVY = {"torch", "flwr", "transformers", "peft", "ray", "datasets", "pandas", "scipy", "pydantic"}


def test_the_packages_are_those_of_this_checkout():
    """The names server and client are generic: another one must not be tested by mistake."""
    for name in PACKAGES:
        found = importlib.import_module(name).__file__
        assert found is not None
        assert Path(found) == ROOT / name / "__init__.py"
    # tests/server/__init__.py would be imported as server.
    assert list((ROOT / "tests").rglob("__init__.py")) == []
    require_own_packages()


@pytest.mark.parametrize("place", ["server/__init__.py", "client.py"])
def test_the_command_says_which_package_is_in_the_way(tmp_path, place):
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


def test_the_command_starts_light():
    code = "import sys, json, simulations.cli; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert HEAVY & set(json.loads(done.stdout)) == set()


def test_no_child_takes_a_module_from_the_working_directory():
    """``python -m`` looks there first; with ``-P`` it does not."""
    found = []
    for path in (path for name in PACKAGES for path in (ROOT / name).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            words = [ast.unparse(each) for each in getattr(node, "elts", ())]
            found += [(path.name, words[: n + 1]) for n, word in enumerate(words) if word == "'-m'"]
    assert len(found) >= 5
    assert [each for each in found if each[1] != ["sys.executable", "'-P'", "'-m'"]] == []
    templates = (ROOT / "simulations/deployment/templates").iterdir()
    lines = [line for path in templates for line in path.read_text().splitlines() if "-m " in line]
    assert lines
    assert [line for line in lines if " -P -m " not in line] == []


def test_an_environment_is_made_with_a_line_for_each_step_and_no_noise(tmp_path):
    """By a Python that makes one in which everything succeeds."""
    for name in ("Makefile", "pyproject.toml", "requirements-assets.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    inside = "mkdir -p .venv/bin; printf '#!/bin/sh\\n' > .venv/bin/python"
    python.write_text(f"#!/bin/sh\n{inside}; chmod +x .venv/bin/python\n")
    python.chmod(0o755)
    made = ["make", ".venv", "PYTHON=./python"]
    # Of its own: beneath another ``make`` it would say where it enters and leaves.
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(made, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert [line[:3] for line in done.stdout.splitlines()] == ["1/3", "2/3", "3/3", "rea"]
    assert done.stderr == ""
