"""Flower's run config of an experiment whose run folder lies somewhere."""

from pathlib import Path

from deal_core.config.experiment import Experiment
from deal_core.config.file import Value, to_run_config


def placed(experiment: Experiment, out: str | Path) -> dict[str, Value]:
    run = experiment.run.model_copy(update={"out": str(out)})
    return to_run_config(experiment.model_copy(update={"run": run}))
