"""The examples of simulations/examples and the code of docs/python.md, as a reader runs them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.forked import Forker

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "simulations/examples"


def said_by(program: Path | str, where: Path) -> str:
    arguments = [str(program)] if isinstance(program, Path) else ["-c", program]
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=where,
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert list(where.iterdir()) == []
    return done.stdout


def said_by_forked(fork: Forker, program: Path, where: Path) -> str:
    """The same, in a process that need not import everything again. The slow tests
    are of a process from its start."""
    where.mkdir(exist_ok=True)
    run = fork(str(program), folder=where)
    said, errors = run.communicate(timeout=560)
    assert run.returncode == 0, errors
    assert list(where.iterdir()) == []
    return said


def numbers(line: str) -> list[float]:
    return [float(word) for word in re.findall(r"\d+\.\d+", line)]


@pytest.mark.slow
def test_an_aggregation_of_ones_own(fork: Forker, tmp_path: Path) -> None:
    lines = said_by_forked(fork, FOLDER / "own_aggregation.py", tmp_path).splitlines()
    before, mean, median = (numbers(line)[0] for line in lines)
    assert [line.split()[0] for line in lines] == ["before", "mean", "median"]
    assert median > mean  # the mean is spoilt by one client of three
    assert median > before - 0.1


@pytest.mark.slow
def test_run_and_predict(tmp_path: Path) -> None:
    # Its run has two worker processes, and it has no guard of its main module.
    lines = said_by(FOLDER / "run_and_predict.py", tmp_path).splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("average accuracy 0.")
    assert lines[1].startswith("after laboratory: ")
    assert numbers(lines[0])[0] == pytest.approx(sum(numbers(lines[2])) / 2, abs=1e-3)
    assert lines[3].startswith("laboratory: Pharmacology")
    assert lines[4].startswith("surgery: ")


@pytest.mark.slow
def test_compare_methods(tmp_path: Path) -> None:
    lines = said_by(FOLDER / "compare_methods.py", tmp_path).splitlines()
    assert [line.split()[0] for line in lines] == ["method", "sequential", "lwf", "deal"]
    assert all(0.3 < numbers(line)[0] <= 1 for line in lines[1:])


def cells() -> list[str]:
    """Code of the notebook, in order."""
    book = json.loads((FOLDER / "tour.ipynb").read_text(encoding="utf-8"))
    assert book["nbformat"] == 4
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"])
    return ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_kept_without_output() -> None:
    book = json.loads((FOLDER / "tour.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert len(code) >= 4
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    # Cells one after another in one namespace, as a kernel runs them: no kernel is a dependency.
    told = said_by("\n".join(cells()), tmp_path).splitlines()
    average, forgetting = numbers(told[0])
    assert 0.4 < average <= 1
    assert 0 <= forgetting <= 1
    assert told[1].startswith("laboratory: Pharmacology")
    assert len(told) == 3


def blocks() -> list[str]:
    page = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)


@pytest.mark.slow
def test_rounds_by_hand_on_the_page(fork: Forker, tmp_path: Path) -> None:
    program = tmp_path / "page.py"
    program.write_text(blocks()[1], encoding="utf-8")
    (share,) = numbers(said_by_forked(fork, program, tmp_path / "empty"))
    assert 0.3 < share <= 1


@pytest.mark.slow
def test_a_whole_run_on_the_page(tmp_path: Path) -> None:
    small = blocks()[0].replace('"runs/mine"', "FOLDER")
    assert small.count("FOLDER") == 2
    with tempfile.TemporaryDirectory() as folder:
        lines = said_by(f"FOLDER = {folder + '/run'!r}\n{small}", tmp_path).splitlines()
    assert 0.4 < float(lines[0]) <= 1
    assert lines[1].split()[1] == "Pharmacology"
