"""What tests of whole runs ask for again and again."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import numpy as np
from safetensors.numpy import load_file

from deal_core.config.experiment import Experiment
from server.results import Results


def at(experiment: Experiment, folder: Path, **run_keys: object) -> Experiment:
    """The experiment with its run in ``folder``; ``run_keys`` are other keys of ``[run]``."""
    changed = experiment.run.model_copy(update={"out": str(folder), **run_keys})
    return experiment.model_copy(update={"run": changed})


def learnt_adapter(folder: Path) -> dict[str, np.ndarray]:
    """The factors that a run exported, and the heads of labels where it has some."""
    factors = load_file(folder / "adapter" / "adapter_model.safetensors")
    heads = folder / "adapter" / "heads.safetensors"
    return {**factors, **(load_file(heads) if heads.exists() else {})}


def same(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> bool:
    """Equal to the bit."""
    return one.keys() == two.keys() and all(np.array_equal(one[key], two[key]) for key in one)


def gain(results: Results) -> float:
    """Average accuracy over what the base model knew before anything was learnt."""
    assert results.average_accuracy is not None
    return results.average_accuracy - fmean(results.zero_shot.values())
