"""``deal status``: sites, last seen, task and round, quarantines, bytes, ε."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from deal_core.errors import UserError
from server.events import TOLD_TO_END
from server.folder import RunFolder
from server.lock import held
from server.spending import Spending
from simulations.deployment.flower_home import CONNECTION
from simulations.deployment.server.flower_status import flower_status
from simulations.deployment.server.folder import ServerFolder
from simulations.deployment.server.next_command import command
from simulations.deployment.server.round_state import round_line
from simulations.deployment.server.run_state import KILLED, RunState, state_of
from simulations.deployment.server.site_registry import registered
from simulations.deployment.server.sites_table import print_sites
from simulations.deployment.server.stop import was_stopped
from simulations.deployment.server.submit import run_folder, starts
from simulations.output.console import print_line
from simulations.run.run_folder import recorded


def status(folder: ServerFolder, name: str, console: Console, as_json: bool) -> None:
    """Print where the run and its sites stand; the latest run when ``name`` is empty.

    Raises:
        UserError: no such run, or this is no server's folder.
    """
    folder.settings()
    sites, fault = connected(folder)
    if not name and not any(folder.runs.glob("*")):
        if as_json:
            print(json.dumps({"run": "", "connected": sites}, indent=1))
            return
        print_sites(console, sites, RunState(), fault)
        print_line(console, f"no run yet; next: {command(folder, 'submit EXPERIMENT')}")
        return
    run = run_folder(folder, name)
    state = state_of(run)
    if state.phase == "stopped" and _starts_again(run, state):
        state.phase, state.reason = "starting", ""
    if state.phase == "starting" and not fault:
        _as_flower_sees_it(folder, state, run)
    if state.phase == "stopped":
        _name_the_command(folder, state, run)
    if as_json:
        told = {"run": run.name, **asdict(state), "connected": sites}
        print(json.dumps(told, indent=1, default=Spending.model_dump))
        return
    for line in described(run.name, state, _deadline(run)):
        print_line(console, line)
    print_sites(console, sites, state, fault)
    print_line(console, next_step(folder, run.name, state))


def _starts_again(run: Path, state: RunState) -> bool:
    """Return whether a run that has stopped was continued, and has not said so yet: it waits for
    its sites first."""
    begun = starts(run)
    later = bool(begun) and float(begun[-1]["time"]) > state.last_event
    return later or held(RunFolder(run).writing)


def connected(folder: ServerFolder) -> tuple[dict[str, str], str]:
    """Return site to what the server knows of its connection (``online``, ``offline``, ...); and
    why it is not known, if the server does not answer (else empty)."""
    known = registered(folder)
    try:
        nodes = folder.flower.ask("supernode", "list", CONNECTION)["nodes"]
    except UserError as error:
        return dict.fromkeys(known, "unknown"), str(error)
    by_node = {str(node["node-id"]): str(node["status"]) for node in nodes}
    return {name: by_node.get(site["node"], "unregistered") for name, site in known.items()}, ""


def described(name: str, state: RunState, deadline: float = 0.0) -> list[str]:
    """Return the run in a few lines.

    Args:
        name: of the run.
        state: where it stands.
        deadline: seconds for which a round waits for replies; 0: not known.
    """
    lines = [f"run {name}: {state.phase}{f' ({state.reason})' if state.reason else ''}"]
    if state.planned:
        lines.append(f"round {state.rounds} of {state.planned} finished{_working(state)}")
        if state.current is not None:
            lines.append(round_line(state.current, state.rounds + 1, deadline, time.time()))
        elif state.phase == "running":
            lines.append("no round is under way: sites evaluate, or the server is at work")
        lines.append(
            f"sent per site {state.bytes_up / 1e6:.2f} MB, received {state.bytes_down / 1e6:.2f} MB"
        )
    if state.summed is not None:
        lines.append(
            f"secure sums: the server sees no site's update; the last sum is over "
            f"{state.summed[0]} of {state.summed[1]} sites"
        )
    if state.lost:
        lines.append(f"the last round was lost, the model stayed as it was: {state.lost}")
    if state.quarantined:
        lines.append(f"left out of the last round: {', '.join(state.quarantined)}")
    if state.accuracy:
        lines.append(f"accuracy {_evaluated(state)}, in % of all sites' test examples:")
        lines.append(f"  among the labels of the task: {_by_task(state, state.accuracy)}")
    if state.among_all:
        lines.append(f"  among all labels seen so far: {_by_task(state, state.among_all)}")
    return lines


def _working(state: RunState) -> str:
    """Return the stage and the tasks at work, both counted from 1."""
    if state.stage < 0:
        return ""
    tasks = ", ".join(f"{state.tasks.index(task) + 1} {task}" for task in state.working)
    name = "task" if len(state.working) == 1 else "tasks"
    return (
        f"; stage {state.stage + 1} of {state.stages}: {name} {tasks or '-'} of {len(state.tasks)}"
    )


def _evaluated(state: RunState) -> str:
    """Say of which model the accuracy is."""
    if state.evaluated < 0:
        return "before any training (zero-shot)"
    return f"after stage {state.evaluated + 1} of {state.stages}"


def _by_task(state: RunState, accuracy: Mapping[str, float]) -> str:
    numbers = {task: number for number, task in enumerate(state.tasks, start=1)}
    parts = (f"{numbers.get(task, '')} {task} {100 * v:.1f}" for task, v in accuracy.items())
    return ", ".join(part.strip() for part in parts)


def next_step(folder: ServerFolder, name: str, state: RunState) -> str:
    """Return what the administrator can do now."""
    if state.phase == "finished":
        run = folder.runs / name
        return f"next: adapter and results.json are in {run}; deal report {shlex.quote(str(run))}"
    if state.phase == "stopped":
        return f"next: {command(folder, f'submit --resume {name}')}"
    return f"next: wait; {command(folder, f'stop {name}')} ends it and keeps its checkpoint"


def _deadline(run: Path) -> float:
    """How many seconds a round of a run waits for replies; 0: the run's settings cannot be read."""
    try:
        return recorded(run).federation.deadline_seconds
    except UserError:
        return 0.0


def _name_the_command(folder: ServerFolder, state: RunState, run: Path) -> None:
    """A run that was stopped on command knows only that its process was told to end."""
    if state.reason in (TOLD_TO_END, KILLED) and was_stopped(folder, run):
        state.reason = "by deal stop"


def _as_flower_sees_it(folder: ServerFolder, state: RunState, run: Path) -> None:
    """A run that ended before its first event is not starting any more."""
    begun = starts(run)
    found = flower_status(folder, begun[-1]["run"]) if begun else ""
    if found.startswith("finished"):
        state.phase = "stopped"
        state.reason = f"Flower says '{found}'; superlink.log in the server's folder has more"
