"""Trackers that follow a run beside its own log: TensorBoard and MLflow, by their own clients, in
the run folder. A tracker that fails costs nothing of the run."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deal_core.config.experiment import Experiment
from deal_core.config.run_config import flatten
from deal_core.errors import UserError
from server.folder import EventLog, RunEvent

OF_A_ROUND = ("seconds", "clients", "aggregation_error", "bytes_up", "bytes_down")
OF_A_RUN = ("average_accuracy", "backward_transfer", "forward_transfer", "forgetting")


class TensorBoard:
    """Writes event files."""

    packages = ("tensorboard",)

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), flush_secs=10)
        self._writer.add_text("settings", "\n".join(f"    {k} = {v}" for k, v in settings.items()))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Write figures of a round of the run."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self, finished: bool) -> None:
        """End the files."""
        self._writer.close()


class MLflow:
    """Writes an SQLite file with one run, which goes on where there is one already."""

    packages = ("mlflow", "sqlalchemy", "alembic")

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient(tracking_uri=f"sqlite:///{(folder / 'mlflow.db').resolve()}")
        known = self._client.get_experiment_by_name("federated-deal")
        if known is not None:
            self._run = self._client.search_runs([known.experiment_id])[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        place = (folder / "artifacts").resolve().as_uri()
        experiment = self._client.create_experiment("federated-deal", artifact_location=place)
        run = self._client.create_run(experiment, run_name=folder.parents[1].name)
        self._run = run.info.run_id
        params = [Param(key, str(value)[:500]) for key, value in settings.items()]
        for start in range(0, len(params), 100):  # MLflow takes no more at a time
            self._client.log_batch(self._run, params=params[start : start + 100])

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Write figures of a round of the run."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        named = {re.sub(r"[^/\w.\- ]", "_", name): value for name, value in figures.items()}
        metrics = [Metric(name, value, now, step) for name, value in named.items()]
        self._client.log_batch(self._run, metrics)

    def close(self, finished: bool) -> None:
        """End the run."""
        self._client.set_terminated(self._run, "FINISHED" if finished else "FAILED")


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], TensorBoard | MLflow]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
}


def check_tracker(experiment: Experiment) -> None:
    """Check that the packages of ``run.track`` are installed; none is imported.

    Raises:
        UserError: one is missing.
    """
    name = experiment.run.track
    packages = getattr(TRACKERS.get(name), "packages", ())
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise UserError(
            f"run.track = '{name}' needs {', '.join(missing)}, which is not installed; run "
            f"pip install --editable '.[{name}]' in the checkout, or leave run.track out"
        )


def figures_of(event: RunEvent) -> dict[str, float]:
    """Return what of an event is drawn; epsilon is in the report, with what it means."""
    drawn: dict[str, float | None] = {}
    if event["event"] == "round_finished":
        drawn = {f"round/{key}": event.get(key) for key in OF_A_ROUND}
    elif event["event"] in ("client_finished", "loss_summed") and "loss" in event:
        client = event.get("client", "sum")
        drawn = {f"loss/{client}": event["loss"]}
    elif event["event"] == "evaluated":
        drawn = {f"accuracy/{task}": value for task, value in event["accuracy"].items()}
        among_all = event.get("class_incremental", {})
        drawn |= {f"accuracy_all_labels/{task}": value for task, value in among_all.items()}
    elif event["event"] == "run_finished":
        drawn = {f"final/{key}": event.get(key) for key in OF_A_RUN}
    return {name: float(value) for name, value in drawn.items() if value is not None}


@contextmanager
def tracked(experiment: Experiment, folder: Path, events: EventLog) -> Iterator[EventLog]:
    """Yield the log of a run, which tells the run's tracker within the block as well. A tracker
    that fails is an event in the log, and told no more.

    Args:
        experiment: with ``run.resume`` the tracker goes on with what it has in the folder.
        folder: for all trackers of the run.
        events: the log.

    Raises:
        UserError: the tracker's package is not installed.
    """
    check_tracker(experiment)
    name = experiment.run.track
    if name == "none":
        yield events
        return
    if not experiment.run.resume:
        shutil.rmtree(folder / name, ignore_errors=True)  # of a start that came to no checkpoint
    faults: list[Exception] = []
    trackers: list[TensorBoard | MLflow] = []
    done = 0

    def safely(call: Callable[[], None]) -> None:
        try:
            if not faults:
                call()
        except Exception as error:
            faults.append(error)
            with suppress(OSError):
                events.write("tracking_failed", tracker=name, reason=f"{error!r}"[:500])

    def follow(event: RunEvent) -> None:
        nonlocal done
        if events.listener is not None:
            events.listener(event)
        done = event.get("round", done)
        step = 0 if event.get("stage", 0) < 0 else done  # the start, before anything is learnt
        if figures := figures_of(event):
            safely(lambda: trackers[0].log(step, figures))

    safely(lambda: trackers.append(TRACKERS[name](folder / name, flatten(experiment))))
    finished = False
    try:
        yield replace(events, listener=follow)
        finished = True
    finally:
        safely(lambda: trackers[0].close(finished))
