"""The examples of simulations/examples and the code of docs/python.md, as a reader runs them."""

import os
import re
import sys
from pathlib import Path
from subprocess import PIPE, Popen

import pytest

from deal_core.data.embedded import asset_folder

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "simulations/examples"


def said_by(program, where, fork=None):
    """What a program prints, which leaves nothing in its folder; with ``fork`` in a process that
    need not import everything again."""
    where.mkdir(exist_ok=True)
    words = [sys.executable, str(program)]
    plain = {"cwd": where, "text": True, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    run = (
        fork(str(program), folder=where)
        if fork
        else Popen(words, stdout=PIPE, stderr=PIPE, **plain)
    )
    said, errors = run.communicate(timeout=560)
    assert run.returncode == 0, errors
    assert list(where.iterdir()) == []
    return said


def numbers(line):
    return [float(word) for word in re.findall(r"\d+\.\d+", line)]


@pytest.mark.slow
def test_rounds_of_ones_own(fork, tmp_path):
    lines = said_by(FOLDER / "own_rounds.py", tmp_path, fork).splitlines()
    assert [line.split(" {")[0] for line in lines] == [
        "round 1: 2 of 3 updates",
        "round 2: 2 of 3 updates",
    ]
    assert numbers(lines[1])[0] > 0.5


@pytest.mark.slow
def test_run_and_predict(tmp_path):
    # Its run has two worker processes, and it has no guard of its main module.
    lines = said_by(FOLDER / "run_and_predict.py", tmp_path).splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("average accuracy 0.")
    assert lines[1].startswith("after laboratory: ")
    assert numbers(lines[0])[0] == pytest.approx(sum(numbers(lines[2])) / 2, abs=1e-3)
    assert lines[3].startswith("laboratory: Pharmacology")
    assert lines[4].startswith("surgery: ")


@pytest.mark.slow
def test_compare_methods(tmp_path):
    # Worker processes: forked, each would write what the first had not yet written.
    lines = said_by(FOLDER / "compare_methods.py", tmp_path).splitlines()
    assert [line.split()[0] for line in lines] == ["method", "sequential", "lwf", "deal"]
    assert all(0.3 < numbers(line)[0] <= 1 for line in lines[1:])


def blocks():
    page = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)


@pytest.mark.slow
def test_the_ten_lines_of_the_page_in_an_empty_file(fork, tmp_path):
    here = str(asset_folder("minilm"))
    lines = blocks()[0].replace("sentence-transformers/all-MiniLM-L6-v2", here)
    few = "clients=2, rounds=1, overrides={'run.threads': 1, 'train.max_length': 16}"
    lines = lines.replace("clients=2, rounds=2", few)  # beside other tests one thread is faster
    program = tmp_path / "page.py"
    program.write_text(lines.replace("runs/own", str(tmp_path / "run")), encoding="utf-8")
    share, *epsilons = numbers(said_by(program, tmp_path / "empty", fork))
    assert 0.5 < share <= 1
    assert all(0 < epsilon <= 8 for epsilon in epsilons)


@pytest.mark.slow
def test_a_whole_run_on_the_page(fork, tmp_path):
    small = blocks()[1].replace("runs/mine", str(tmp_path / "run"))
    assert small.count("/run") == 2
    (tmp_path / "page.py").write_text(small, encoding="utf-8")
    lines = said_by(tmp_path / "page.py", tmp_path / "empty", fork).splitlines()
    assert 0.4 < float(lines[0]) <= 1
    assert lines[1].split()[1] == "Pharmacology"
