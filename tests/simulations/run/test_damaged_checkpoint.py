"""A damaged last checkpoint: the run goes on from the one before, says so, and loses nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from deal_core.config.experiment import Experiment
from server.folder import RunFolder
from server.results import read_results
from simulations.engines.inprocess import run_inprocess


class Stopped(Exception):
    """Thrown by the listener: the run ends there."""


def test_the_one_before_gives_the_same_end(
    tmp_path: Path, make_experiment: Callable[..., Experiment]
) -> None:
    def experiment(out: Path, resume: bool = False) -> Experiment:
        own = make_experiment(f'run.out="{out}"', f"run.resume={str(resume).lower()}")
        small = own.data.model_copy(update={"tasks": ("surgery",)})
        return own.model_copy(update={"data": small})

    def stop(event: dict) -> None:
        if event["event"] == "round_started" and event["server_round"] == 2:
            raise Stopped

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_inprocess(experiment(whole), lambda event: None)
    with pytest.raises(Stopped):
        run_inprocess(experiment(broken), stop)
    checkpoint = RunFolder(broken).checkpoint
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    seen: list[dict] = []
    run_inprocess(experiment(broken, resume=True), seen.append)
    assert seen[0]["event"] == "checkpoint_damaged"
    assert "damaged checkpoint" in seen[0]["reason"]
    again, once = read_results(broken), read_results(whole)
    assert again.accuracy_matrix == once.accuracy_matrix
    assert again.class_incremental == once.class_incremental
    assert once.class_incremental is not None
    adapters = [RunFolder(folder).adapter for folder in (whole, broken)]
    one, two = (load_file(adapter / "adapter_model.safetensors") for adapter in adapters)
    for key, value in one.items():
        np.testing.assert_array_equal(value, two[key])
