"""The Flower ServerApp: configuration in, a run folder out."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from deal_core.config.experiment import Experiment
from deal_core.config.run_config import from_run_config
from server.events import Listener


def make_app(listener: Listener | None = None) -> ServerApp:
    """Return a ServerApp; ``listener`` receives every event beside ``metrics.jsonl``."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        from server.run import run

        experiment = from_run_config(context.run_config)
        run(grid, with_run_folder(experiment, context.run_id), listener)

    return app


def with_run_folder(experiment: Experiment, run_id: int) -> Experiment:
    """Name a folder for a run started with plain ``flwr run``."""
    out = experiment.run.out or str(Path.home() / "federated-deal-runs" / str(run_id))
    run = experiment.run.model_copy(update={"out": out})
    return experiment.model_copy(update={"run": run})


app = make_app()
