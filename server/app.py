"""The Flower ServerApp: configuration in, a run folder out."""

from logging import INFO
from pathlib import Path

from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from deal_core.config.experiment import Experiment
from deal_core.config.file import PACKAGE, from_run_config
from deal_core.errors import UserError
from deal_core.installed import package_digest
from server.folder import Listener


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
        run(grid, experiment, listener)
        if listener is None:  # started by Flower: its log is all that a person sees
            log(INFO, "next: deal report %s", experiment.run.out)

    return app


def with_run_folder(experiment: Experiment, run_id: int) -> Experiment:
    """Return the experiment with a folder for a run started with plain ``flwr run``."""
    out = experiment.run.out or str(Path.home() / "federated-deal-runs" / str(run_id))
    return experiment.changed(run={"out": out})


app = make_app()
