"""One run from start, or from its checkpoint, to its results; and the checkpoint, a file of which
the one before is kept."""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from flwr.serverapp import Grid
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from deal_core.atomic_write import atomic_path
from deal_core.config.experiment import Experiment
from deal_core.data import client_names, open_source
from deal_core.errors import UserError
from deal_core.lora.adapter import Adapter, Shapes
from deal_core.lora.payload import HEADS, LORA, RESIDUAL, RETAINED, SUMS
from deal_core.lora.state import Component, State, from_arrays, to_arrays
from deal_core.methods import method_of
from deal_core.models import adapter_shapes
from deal_core.privacy.distributed_noise import whom_to_trust
from deal_core.protection import make_mechanism
from server.clients import Clients, find_roster
from server.export import export_adapter, hand_over, task_spaces, write_card
from server.folder import (
    EventLog,
    Listener,
    RunFolder,
    exclusive_lock,
    previous_checkpoint,
    tracked,
)
from server.measures import make_results, peak_rss_bytes
from server.plan import make_plan
from server.results import History, Results, write_results
from server.strategy import DealStrategy, start_state

VERSION = 7
"""Of a checkpoint's file, and of the schedule that its position counts in."""


@dataclass(frozen=True)
class Checkpoint:
    """State after ``position`` steps of the schedule."""

    position: int
    state: State
    history: History


def run(grid: Grid, experiment: Experiment, listener: Listener | None = None) -> Results:
    """Return the results: walk the schedule to its end; a checkpoint follows every step.

    Args:
        grid: Flower's, or one that runs in this process.
        experiment: ``run.out`` is the run folder; with ``run.resume`` it holds a checkpoint.
        listener: receives every event beside ``metrics.jsonl``.

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
    steps, done, names = strategy.steps, checkpoint.position, client_names(experiment)
    events.write(
        "run_started",
        tasks=tasks,
        clients=len(roster.clients),
        sites=names,
        unit=mechanism.unit,
        unit_column=experiment.privacy.unit_column,
        assumes=whom_to_trust(experiment.privacy),
        stages=[
            {
                "rounds": sum(step.kind == "round" and step.stage == stage for step in steps),
                "learning": plan.stages[stage],
                "tasks": list(plan.work(stage)),
            }
            for stage in range(len(plan.stages))
        ],
        resumed=done > 0,
        done_rounds=sum(step.kind == "round" for step in steps[:done]),
    )
    for position, step in enumerate(steps[done:], start=done + 1):
        strategy.play(step)
        peak = max(strategy.history.peak_rss_bytes, peak_rss_bytes())
        strategy.history = strategy.history.model_copy(update={"peak_rss_bytes": peak})
        save_checkpoint(folder.checkpoint, Checkpoint(position, strategy.state, strategy.history))
    spaces = task_spaces(experiment, plan.learnt(len(plan.stages) - 1))
    labels = {space.name: space.labels for space in spaces}
    results = make_results(experiment, plan, strategy.history, labels, names)
    inference = export_adapter(folder.adapter, strategy.state, experiment, spaces)
    write_card(folder.adapter, results, inference)
    write_results(folder.results, results)
    if experiment.federation.sites:
        seconds = experiment.federation.deadline_seconds
        hand_over(grid, roster, folder.adapter, events, seconds)
    measures = ("average_accuracy", "backward_transfer", "forward_transfer", "forgetting")
    events.write("run_finished", **{name: getattr(results, name) for name in measures})
    return results


def _start(experiment: Experiment, folder: RunFolder, events: EventLog) -> Checkpoint:
    """The checkpoint to go on from; a new run has one before its first step."""
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
    checkpoint = Checkpoint(0, start_state(experiment, shapes), History())
    save_checkpoint(folder.checkpoint, checkpoint)
    return checkpoint


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write beside ``path``, flush to disk, then rename: a kill leaves the old or the new file.
    The old one is kept as well: a disk can spoil what was written whole.

    Raises:
        UserError: it cannot be written; the old one stands.
    """
    state = checkpoint.state
    adapters = {LORA: state.current, RETAINED: state.retained}
    if state.residual is not None:
        adapters[RESIDUAL] = state.residual
    parts = {part: to_arrays(adapter) for part, adapter in adapters.items()}
    for part, own in ((HEADS, state.heads), (SUMS, state.sums)):
        parts[part] = {key: value.numpy() for key, value in own.items()}
    tensors = {
        f"{part}/{key}": np.ascontiguousarray(value)
        for part, arrays in parts.items()
        for key, value in arrays.items()
    }
    meta = {
        "version": str(VERSION),
        "position": str(checkpoint.position),
        "history": checkpoint.history.model_dump_json(),
        "scaling": repr(state.current.scaling),
        "rank": str(state.current.rank),
        "retained_rank": str(state.retained.rank),
        "residual_rank": str(state.residual.rank if state.residual is not None else 0),
        "num_reference_directions": str(state.num_reference_directions),
        "components": json.dumps([[each.tasks, each.rank] for each in state.components]),
    }
    meta["sha256"] = _digest(tensors, meta)
    second = path.with_suffix(".keeping")
    try:
        with atomic_path(path) as beside:
            beside.write_bytes(save(tensors, meta))
            second.unlink(missing_ok=True)
            with suppress(OSError):  # a disk may have no second names of a file
                os.link(path, second)
                second.replace(previous_checkpoint(path))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); the checkpoint before it stands: make "
            "room, then continue with --resume"
        ) from None


def _digest(tensors: Mapping[str, np.ndarray], meta: Mapping[str, str]) -> str:
    """SHA-256 of everything that the file says."""
    hashed = hashlib.sha256(json.dumps(dict(meta), sort_keys=True).encode())
    for key in sorted(tensors):
        hashed.update(f"{key} {tensors[key].dtype} {tensors[key].shape}".encode())
        hashed.update(np.ascontiguousarray(tensors[key]).tobytes())
    return hashed.hexdigest()


def load_latest(path: Path, shapes: Shapes) -> tuple[Checkpoint, str]:
    """Return the last checkpoint that is good, and why it is not the last one (empty: it is). It
    takes the place of a damaged one, which the next would otherwise keep as its predecessor.

    Raises:
        UserError: none is good; the message is about the last one.
    """
    try:
        return load_checkpoint(path, shapes), ""
    except UserError as error:
        previous = previous_checkpoint(path)
        if not previous.exists():
            raise
        try:
            found = load_checkpoint(previous, shapes)
        except UserError:
            raise error from None
        previous.replace(path)
        return found, str(error)


def load_checkpoint(path: Path, shapes: Shapes) -> Checkpoint:
    """Return a checkpoint, read and checked.

    Raises:
        UserError: missing, damaged, of another version, or made for another model.
    """  # noqa: DOC501 (a ValueError within becomes a UserError)
    try:
        with safe_open(str(path), framework="numpy") as file:
            meta = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if meta.get("version") != str(VERSION):
            raise UserError(
                f"{path}: checkpoint of version {meta.get('version')}, not {VERSION}: another "
                "release of this project made it; go on with that one, or begin the run anew"
            )
        if meta.pop("sha256", "") != _digest(tensors, meta):
            raise ValueError("its content is not what was written")
        parts: dict[str, dict[str, np.ndarray]] = {}
        for name, value in tensors.items():
            part, key = name.split("/", 1)
            parts.setdefault(part, {})[key] = value

        def adapter(part: str, rank: str, scaling: float = 1.0) -> Adapter:
            return from_arrays(parts.get(part, {}), shapes, int(meta[rank]), scaling)

        def named(part: str) -> dict[str, torch.Tensor]:
            return {k: torch.from_numpy(value.copy()) for k, value in parts.get(part, {}).items()}

        state = State(
            adapter(LORA, "rank", float(meta["scaling"])),
            adapter(RETAINED, "retained_rank"),
            adapter(RESIDUAL, "residual_rank") if int(meta["residual_rank"]) else None,
            int(meta["num_reference_directions"]),
            named(HEADS),
            tuple(Component(tuple(own), rank) for own, rank in json.loads(meta["components"])),
            named(SUMS),
        )
        history = History.model_validate_json(meta["history"])
        return Checkpoint(int(meta["position"]), state, history)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no checkpoint to resume from; start without --resume") from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(
            f"{path}: damaged checkpoint ({error}); begin the run anew in another folder"
        ) from None
