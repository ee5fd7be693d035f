"""What the README promises of the quickstart, on the real thing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from server.results import Results, read_results


def deal(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = "from simulations.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )


def learnt(name: str, folder: Path, gain: float) -> Results:
    """What a shipped experiment reaches: so much above zero-shot; what was forgotten is printed."""
    outcome = deal("simulate", name, "--out", str(folder))
    assert outcome.returncode == 0, outcome.stderr
    results = read_results(folder)
    zero_shot = sum(results.zero_shot.values()) / len(results.zero_shot)
    assert results.average_accuracy >= zero_shot + gain
    assert "forgetting" in outcome.stdout
    return results


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_quickstart_learns_and_hardly_forgets(tmp_path: Path) -> None:
    results = learnt("quickstart", tmp_path / "run", gain=0.05)
    assert results.forgetting <= 0.03


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_method_beats_sequential_training_on_the_same_budget(tmp_path: Path) -> None:
    averages = {}
    for method in ("deal", "sequential"):
        folder = tmp_path / method
        outcome = deal(
            "simulate",
            "quickstart",
            "--out",
            str(folder),
            "--set",
            f"method.name={method}",
            "--set",
            "data.max_train=400",
        )
        assert outcome.returncode == 0, outcome.stderr
        averages[method] = read_results(folder)
    assert averages["deal"].average_accuracy > averages["sequential"].average_accuracy
    assert averages["deal"].forgetting < averages["sequential"].forgetting


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_language_model_learns_two_kinds_of_tasks_and_hardly_forgets(tmp_path: Path) -> None:
    results = learnt("quickstart-llm", tmp_path / "run", gain=0.10)
    assert results.backward_transfer >= -0.02
    assert sorted(results.measures.values()) == ["accuracy", "accuracy", "rouge-l"]
