"""Runs that are finished, to be used."""

from __future__ import annotations

from pathlib import Path

from deal_core.config.experiment import Experiment
from simulations.engines.inprocess import run_inprocess
from tests.simulations.runs import at

LEARNING = (
    *("federation.rounds=1", "train.learning_rate=1e-2", "method.name=sequential"),
    "train.precision=float32",
)


def finished(folder: Path, experiment: Experiment) -> Path:
    run_inprocess(at(experiment, folder), lambda event: None)
    return folder
