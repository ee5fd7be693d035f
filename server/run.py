"""One run from start, or from its checkpoint, to its results."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from flwr.serverapp import Grid

from deal_core.config.experiment import Experiment
from deal_core.data import open_source
from deal_core.errors import UserError
from deal_core.methods import method_of
from deal_core.models import adapter_shapes
from deal_core.privacy.distributed_noise import whom_to_trust
from deal_core.protection import make_mechanism
from server.checkpoint import Checkpoint, History, load_latest, save_checkpoint
from server.clients import Clients, find_roster
from server.export import export_adapter, hand_over, task_spaces
from server.folder import EventLog, Listener, RunFolder, exclusive_lock
from server.measures import make_results, peak_rss_bytes
from server.model_card import write_card
from server.plan import make_plan
from server.results import Results, write_results
from server.strategy import DealStrategy, start_state
from server.tracking import tracked


def run(grid: Grid, experiment: Experiment, listener: Listener | None = None) -> Results:
    """Walk the schedule to its end; a checkpoint follows every step.

    Args:
        grid: Flower's, or one that runs in this process.
        experiment: ``run.out`` is the run folder; with ``run.resume`` it holds a checkpoint.
        listener: see :class:`EventLog`.

    Returns:
        The results of the run.

    Raises:
        UserError: clients missing, quorum not met, checkpoint unusable, another process writes
            the run folder, or the package of ``run.track`` is not installed.
    """
    folder = RunFolder(Path(experiment.run.out))
    with (
        exclusive_lock(folder.writing),
        tracked(experiment, folder.tracking, EventLog(folder.metrics, listener)) as events,
    ):
        try:
            events.mend()
            return _run(grid, experiment, folder, events)
        except BaseException as error:
            with suppress(OSError):  # a full disk must not hide the reason
                events.write("run_stopped", reason=f"{type(error).__name__}: {error}"[:500])
            raise


def _run(grid: Grid, experiment: Experiment, folder: RunFolder, events: EventLog) -> Results:
    mechanism = make_mechanism(experiment)  # refuses what it cannot protect, as the method does
    method_of(experiment)
    tasks = list(open_source(experiment.data).task_names())
    checkpoint = _start(experiment, folder, events)
    roster = find_roster(grid, experiment.federation)
    plan = make_plan(experiment, tasks, roster.clients)
    clients = Clients(grid, experiment, roster, events)
    strategy = DealStrategy(clients, plan, checkpoint.state, checkpoint.history)
    steps, done = strategy.steps, checkpoint.position
    events.write(
        "run_started",
        tasks=tasks,
        clients=len(roster.clients),
        sites=list(experiment.federation.sites),
        unit=mechanism.unit,
        unit_column=experiment.privacy.unit_column,
        assumes=whom_to_trust(experiment.privacy),
        stages=[
            {
                "rounds": sum(step.kind == "round" and step.stage == stage for step in steps),
                "tasks": list(plan.work(stage)),
            }
            for stage in range(len(plan.stages))
        ],
        resumed=done > 0,
        done_rounds=sum(step.kind == "round" for step in steps[:done]),
    )
    for position, step in enumerate(steps[done:], start=done + 1):
        strategy.play(step)
        strategy.history = strategy.history.with_peak(peak_rss_bytes())
        save_checkpoint(
            folder.checkpoint,
            Checkpoint(position=position, state=strategy.state, history=strategy.history),
        )
    results = _finish(experiment, strategy, folder)
    if experiment.federation.sites:
        seconds = experiment.federation.deadline_seconds
        hand_over(grid, roster, folder.adapter, events, seconds)
    events.write(
        "run_finished",
        average_accuracy=results.average_accuracy,
        backward_transfer=results.backward_transfer,
        forward_transfer=results.forward_transfer,
        forgetting=results.forgetting,
    )
    return results


def _start(experiment: Experiment, folder: RunFolder, events: EventLog) -> Checkpoint:
    shapes = adapter_shapes(experiment.model, experiment.adapter)
    if experiment.run.resume:
        checkpoint, damage = load_latest(folder.checkpoint, shapes)
        if damage:
            events.write("checkpoint_damaged", reason=damage, position=checkpoint.position)
        return checkpoint
    if folder.holds_run:
        raise UserError(
            f"{folder.path}: already holds a run; continue it with run.resume = true, or choose "
            "another run.out"
        )
    checkpoint = Checkpoint(position=0, state=start_state(experiment, shapes), history=History())
    save_checkpoint(folder.checkpoint, checkpoint)
    return checkpoint


def _finish(experiment: Experiment, strategy: DealStrategy, folder: RunFolder) -> Results:
    """Write the adapter folder, and then the results."""
    plan = strategy.plan
    spaces = task_spaces(experiment, plan.learnt(len(plan.stages) - 1))
    labels = {space.name: space.labels for space in spaces}
    results = make_results(experiment, plan, strategy.history, labels)
    inference = export_adapter(folder.adapter, strategy.state, experiment, spaces)
    write_card(folder.adapter, results, inference)
    write_results(folder.results, results)
    return results
