"""What the README promises of the quickstart, on the real thing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from server.results import Results, read_results
from tests.simulations.runs import gain

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def learnt(name: str, folder: Path, *settings: str) -> Results:
    """What a shipped experiment reaches, as the command runs it."""
    arguments = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "simulations.cli", "simulate", name, "--out", str(folder)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "forgetting" in done.stdout
    return read_results(folder)


def test_the_quickstart_learns_and_hardly_forgets(tmp_path: Path) -> None:
    results = learnt("quickstart", tmp_path / "run")
    assert gain(results) >= 0.05
    assert results.forgetting <= 0.03


def test_the_method_beats_sequential_training_on_the_same_budget(tmp_path: Path) -> None:
    deal, sequential = (
        learnt("quickstart", tmp_path / method, f"method.name={method}", "data.max_train=400")
        for method in ("deal", "sequential")
    )
    assert deal.average_accuracy > sequential.average_accuracy
    assert deal.forgetting < sequential.forgetting


def test_a_language_model_learns_four_tasks_that_write_and_forgets_none(tmp_path: Path) -> None:
    results = learnt("quickstart-llm", tmp_path / "run")
    assert gain(results) >= 0.25
    assert results.backward_transfer == 0.0
    assert sorted(results.measures.values()) == ["exact-match", "rouge-l", "rouge-l", "rouge-l"]
    assert results.class_incremental is not None
    assert results.class_incremental.average_accuracy > results.average_accuracy - 0.05
