"""The Flower ServerApp: configuration in, a run folder out."""

from __future__ import annotations

from logging import INFO
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from deal_core.config.experiment import Experiment
from deal_core.config.run_config import PACKAGE, from_run_config
from deal_core.errors import UserError
from deal_core.installed import package_digest
from server.folder import Listener

if TYPE_CHECKING:
    from server.results import Results


def make_app(listener: Listener | None = None) -> ServerApp:
    """Return a ServerApp; ``listener`` receives every event beside ``metrics.jsonl``."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        from server.run import run

        theirs = str(context.run_config.get(PACKAGE, ""))
        if theirs and theirs != package_digest():
            raise UserError(
                "the run was submitted by another federated-deal than the one that is installed "
                "where the server runs; install the same release at both"
            )
        experiment = with_run_folder(from_run_config(context.run_config), context.run_id)
        results = run(grid, experiment, listener)
        if listener is None:  # started by Flower: its log is all that a person sees
            for line in closing_lines(results, Path(experiment.run.out)):
                log(INFO, line)

    return app


def closing_lines(results: Results, folder: Path) -> list[str]:
    """Return what a run has come to, and where it is, for Flower's log."""
    average, among_all = results.average_accuracy, results.class_incremental
    if average is None:
        accuracy = "accuracy: not known, since counts of right answers were kept or lost"
    else:
        accuracy = f"average accuracy {100 * average:.1f} % after {len(results.tasks)} tasks"
        if among_all is not None:
            accuracy += f", {100 * among_all.average_accuracy:.1f} % among all labels"
    return [
        accuracy,
        f"results: {folder / 'results.json'}",
        f"next: deal report {folder}, or deal predict {folder} TEXT",
    ]


def with_run_folder(experiment: Experiment, run_id: int) -> Experiment:
    """Name a folder for a run started with plain ``flwr run``."""
    out = experiment.run.out or str(Path.home() / "federated-deal-runs" / str(run_id))
    run = experiment.run.model_copy(update={"out": out})
    return experiment.model_copy(update={"run": run})


app = make_app()
