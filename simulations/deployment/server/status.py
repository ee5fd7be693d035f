"""``deal status``: where a run and its sites stand, in lines, as a table, or as JSON."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deal_core.errors import UserError
from deal_core.privacy.events import unit_text
from server.folder import TOLD_TO_END, RunFolder, held
from server.results import MORE_TRUST, VOID, Spending, rounded_up, whole_extent
from simulations.deployment.programs import CONNECTION
from simulations.deployment.server.folder import ServerFolder, command
from simulations.deployment.server.run_state import (
    KILLED,
    RoundState,
    RunState,
    SiteState,
    state_of,
)
from simulations.deployment.server.submit import flower_status, run_folder, starts, was_stopped
from simulations.deployment.server.superlink import registered
from simulations.output.console import print_line
from simulations.run.run_folder import recorded

COLUMNS = ("site", "connection", "last reply", "task", "rounds", "faults", "last fault")


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


def round_line(current: RoundState, number: int, deadline: float, now: float) -> str:
    """Return a round in one line.

    Args:
        current: the round.
        number: of all rounds of the run, from 1.
        deadline: seconds for which it waits for replies; 0: not known.
        now: seconds since 1970.
    """
    sites = "1 site" if current.asked == 1 else f"{current.asked} sites"
    parts = [f"{sites} asked {span(now - current.since)} ago", f"{len(current.replied)} replied"]
    parts += [f"{len(current.declined)} declined"] if current.declined else []
    parts += [f"{len(current.failed)} failed"] if current.failed else []
    left = current.since + deadline - now
    if deadline:
        parts.append(f"deadline in {span(left)}" if left > 0 else "the deadline has passed")
    return f"round {number}: {', '.join(parts)}"


def print_sites(
    console: Console, connections: Mapping[str, str], state: RunState, fault: str
) -> None:
    """Print a line for each site of a run, and for each that is registered.

    Args:
        console: to print on.
        connections: registered site to what the server knows of its connection.
        state: of the run; a new one where there is none yet.
        fault: why connections are not known; empty: they are.
    """
    spent = {name: site.spent for name, site in state.sites.items() if site.spent is not None}
    table = Table()
    for column in COLUMNS:
        table.add_column(column)
    if spent:
        table.add_column(f"ε per {unit_text(state.unit, state.unit_column)} so far")
    for name in [*state.sites, *(name for name in connections if name not in state.sites)]:
        site = state.sites.get(name, SiteState())
        row = _row(name, connections.get(name, "not registered"), site)
        row += [_cost(site.spent)] if spent else []
        table.add_row(*map(Text, row))  # a site's own words are no markup
    console.print(table)
    for line in epsilon_lines(spent, state.assumes):
        print_line(console, line)
    if fault:
        print_line(console, f"connections unknown: {fault}")


def _row(name: str, connection: str, site: SiteState) -> list[Any]:
    last = f"{span(time.time() - site.last_seen)} ago" if site.last_seen else "never"
    counts = [str(site.rounds), str(site.faults)]
    return [name, connection, last, site.task, *counts, site.last_fault]


def _cost(spent: Spending | None) -> str:
    """An epsilon with its delta; the lines of :func:`epsilon_lines` say the rest."""
    if spent is None:
        return ""
    void = ", void for some" if spent.void else ""
    seeded = ", simulation only" if spent.simulation_only else ""
    return f"{rounded_up(spent.epsilon, 3)} at δ {rounded_up(spent.delta, 2)}{void}{seeded}"


def epsilon_lines(spent: Mapping[str, Spending], assumes: str) -> list[str]:
    """Return what the epsilons of a run compose over, and whom they take to be honest: nobody can
    read one without.

    Args:
        spent: site to what it has spent; empty: no line.
        assumes: whom the run's settings take to be honest.
    """
    if not spent:
        return []
    extents: dict[str, list[str]] = {}
    for name, each in spent.items():
        extents.setdefault(whole_extent(each.disjoint_tasks), []).append(name)
    lines = [f"{_whose(names, spent)} composes over {extent}" for extent, names in extents.items()]
    lines.append(f"whom ε counts on: {assumes or 'not known'}")
    more = [name for name, each in spent.items() if each.assumes_more]
    lines += [f"{_whose(more, spent)} counts on these {MORE_TRUST}"] if more else []
    void = [name for name, each in spent.items() if each.void]
    return [*lines, *([f"{_whose(void, spent)} is {VOID}"] if void else [])]


def _whose(names: Iterable[str], spent: Mapping[str, Spending]) -> str:
    """Say of which sites an epsilon is; of all: without their names."""
    return "ε" if set(names) == spent.keys() else f"ε of {', '.join(names)}"


def span(seconds: float) -> str:
    """Return a duration in words: seconds below two minutes, else minutes."""
    whole = max(0, round(seconds))
    return f"{whole} s" if whole < 120 else f"{whole // 60} min"
