"""Tracker ``mlflow``: an SQLite file. ``python -m server.tracking.mlflow FOLDER NAME``."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

from server.tracking.lines import figures, lines, settings

EXPERIMENT = "federated-deal"
PARAMETERS = 100
"""MLflow takes no more at a time."""
LONGEST = 500
"""Characters of a parameter, in every version."""


def main(folder: Path, name: str) -> None:
    """Write all figures as metrics of one run, which goes on where there is one already.

    Args:
        folder: gets ``mlflow.db``.
        name: of the run.
    """
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client = MlflowClient(tracking_uri=f"sqlite:///{(folder / 'mlflow.db').resolve()}")
    parameters = [Param(key, str(value)[:LONGEST]) for key, value in settings().items()]
    run = _known_run(client)
    if run is None:
        run = _new_run(client, folder, name)
        for start in range(0, len(parameters), PARAMETERS):
            client.log_batch(run, params=parameters[start : start + PARAMETERS])
    status = "FAILED"
    for line in lines():
        step, values = figures(line)
        now = int(time.time() * 1000)
        client.log_batch(run, [Metric(allowed(k), v, now, step) for k, v in values.items()])
        status = "FINISHED" if line.get("finished") else status
    client.set_terminated(run, status)


def allowed(name: str) -> str:
    """Return the name of a metric with an underscore for what MLflow refuses in one."""
    return re.sub(r"[^/\w.\- ]", "_", name)


def _new_run(client: Any, folder: Path, name: str) -> str:
    """Return the id of a run, made."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        place = (folder / "artifacts").resolve().as_uri()
        identity = client.create_experiment(EXPERIMENT, artifact_location=place)
    else:
        identity = experiment.experiment_id
    return str(client.create_run(identity, run_name=name).info.run_id)


def _known_run(client: Any) -> str | None:
    """Return the id of the run that is being resumed, open again; None where there is none."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return None
    for run in client.search_runs([experiment.experiment_id], max_results=1):
        client.update_run(run.info.run_id, status="RUNNING")
        return str(run.info.run_id)
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
