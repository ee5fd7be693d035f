"""Class means of a handful of records do not drown what names of labels say."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.results import read_results
from simulations.engines.inprocess import run_inprocess

pytestmark = pytest.mark.usefixtures("one_model")


def accuracy(make_experiment, out: Path, *settings: str) -> float:
    """The mean over tasks, each told, where training moves nothing."""
    nothing = ("method.name=deal", "train.learning_rate=1e-9", "federation.rounds=1")
    few = ("data.max_train=12", "data.max_test=0", "train.max_length=32")
    run_inprocess(
        make_experiment(f'run.out="{out}"', *nothing, *few, *settings), lambda event: None
    )
    found = read_results(out).average_accuracy
    assert found is not None
    return found


def test_with_a_dozen_records_a_task_class_means_are_no_loss(make_experiment, tmp_path) -> None:
    names = accuracy(make_experiment, tmp_path / "names", "method.prototype.enabled=off")
    both = accuracy(make_experiment, tmp_path / "both", "method.prototype.enabled=on")
    assert both >= names - 0.02
