"""Flower's run config of an experiment whose run folder lies somewhere."""

from deal_core.config.file import to_run_config


def placed(experiment, out):
    run = experiment.run.model_copy(update={"out": str(out)})
    return to_run_config(experiment.model_copy(update={"run": run}))
