"""``deal status``: what the events of a run say about where it and its sites stand, in lines, as a
table, or as JSON."""

from __future__ import annotations

import json
import shlex
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deal_core.errors import UserError
from deal_core.privacy.events import unit_text
from server.folder import (
    TOLD_TO_END,
    RunEvent,
    RunFolder,
    held,
    plain_reason,
    read_events,
    site_name,
    without_undone,
)
from server.results import (
    MORE_TRUST,
    VOID,
    Spending,
    read_results,
    rounded_up,
    spending_in,
    whole_extent,
)
from simulations.deployment.server.folder import ServerFolder, registered
from simulations.deployment.server.submit import flower_status, run_folder, starts, was_stopped
from simulations.engines.flower import CONNECTION
from simulations.output.console import print_line
from simulations.run.run_folder import recorded

ROUND_ENDS = frozenset(
    {"round_finished", "round_skipped", "run_started", "run_finished", "run_stopped"}
)
"""Events after which no round is under way."""
WHERE = ("stage", "phase", "server_round")
FAULTS = ("client_failed", "reply_dropped", "leg_failed")
KILLED = "its process has ended without a word: the server was killed or restarted"
MEANING = {
    "client reports 'unpinned'": "a peer's key is not pinned there; its log says whose",
    "client reports 'protocol'": "it refuses a leg of the secure sum; its log says why",
}
"""What Flower has a number for, and a site a word."""
SITS_OUT = {
    "policy": "its policy refuses the experiment (deal site check --experiment FILE, there)",
    "budget-spent": "its privacy budget is spent (deal ledger, there)",
}
"""Words by which a site takes no part for longer than a task."""


ANSWERS = {"client_finished": "replied", "client_idle": "declined", "client_failed": "failed"}
"""Event to what it is counted as in a round."""


@dataclass
class RoundState:
    """One round, from the event that starts it to the one that ends it.

    Attributes:
        since: when it began, seconds since 1970.
        asked: how many sites it asks.
        where: stage, phase and number within the stage.
        answers: client to the last of its answers, a value of ``ANSWERS``.
    """

    since: float
    asked: int
    where: list[Any]
    answers: dict[str, str] = field(default_factory=dict)


@dataclass
class SiteState:
    """One site in one run.

    Attributes:
        last_seen: time of its last valid reply, seconds since 1970; 0: none yet.
        task: of that reply.
        rounds: valid updates so far.
        faults: rounds without a valid reply, and replies that were dropped.
        last_fault: the reason of the last one, or why it takes no part at all.
        spent: what privacy has cost, all rounds and tasks so far; None: nobody says.
    """

    last_seen: float = 0.0
    task: str = ""
    rounds: int = 0
    faults: int = 0
    last_fault: str = ""
    spent: Spending | None = None


@dataclass
class RunState:
    """One run.

    Attributes:
        phase: ``starting``, ``running``, ``stopped`` or ``finished``.
        reason: why it stopped.
        stage: that was worked on last, from 0, of so many ``stages``; -1: none yet.
        rounds: finished, of ``planned``.
        current: the round that is under way; None: none is.
        quarantined: sites left out in the last round, by a check or a robust rule.
        summed: how many sites the last secure sum is over, of how many; None: updates are seen.
        lost: why the last round was lost; empty: it was not.
        bytes_up, bytes_down: of the whole run, mean per site.
        accuracy: task to 0-1, as last evaluated.
        evaluated: after which stage, from 0; -1: before the first.
        among_all: the same among all labels seen so far; empty: not known.
        unit: of privacy: what an epsilon protects; empty: nothing is protected.
        unit_column: of groups, as the experiment names it.
        assumes: whom an epsilon takes to be honest.
    """

    phase: str = "starting"
    reason: str = ""
    stage: int = -1
    stages: int = 0
    server_round: int = 0
    rounds: int = 0
    planned: int = 0
    current: RoundState | None = None
    tasks: list[str] = field(default_factory=list)
    working: list[str] = field(default_factory=list)
    quarantined: list[str] = field(default_factory=list)
    summed: tuple[int, int] | None = None
    lost: str = ""
    bytes_up: float = 0.0
    bytes_down: float = 0.0
    accuracy: dict[str, float] = field(default_factory=dict)
    among_all: dict[str, float] = field(default_factory=dict)
    evaluated: int = -1
    unit: str = ""
    unit_column: str = ""
    assumes: str = ""
    last_event: float = 0.0
    sites: dict[str, SiteState] = field(default_factory=dict)


def run_state(events: Iterable[RunEvent]) -> RunState:
    """Fold the events into a state; sites go by their names."""
    state, names = RunState(), list[str]()
    for event in without_undone(events):
        state.last_event = event["time"]
        state.current = round_after(event, state.current)
        if event["event"] == "run_started":
            names = event.get("sites") or [str(k) for k in range(event["clients"])]
            _begin(state, event, names)
        elif event["event"] in ("client_finished", *FAULTS):
            _heard(state, site_name(event["client"], names), event)
        elif event["event"] == "client_idle" and event.get("code") in SITS_OUT:
            site = state.sites.setdefault(site_name(event["client"], names), SiteState())
            site.last_fault = SITS_OUT[event["code"]]
        else:
            _told(state, event, names)
    return state


def state_of(run: Path) -> RunState:
    """Return the state of a run folder. ``finished`` is a run whose results are there and valid,
    ``running`` one that some process writes."""
    folder = RunFolder(run)
    state = run_state(read_events(folder.metrics))
    if state.phase == "running" and not held(folder.writing):
        state = run_state(read_events(folder.metrics))  # it may have ended in between
    if state.phase == "running" and not held(folder.writing):
        state.phase, state.reason, state.current = "stopped", KILLED, None
    if state.phase == "finished":
        try:
            read_results(run)
        except UserError as error:
            state.phase, state.reason = "stopped", str(error)
    return state


def round_after(event: Mapping[str, Any], current: RoundState | None) -> RoundState | None:
    """Return the round that is under way after an event; None: none is."""
    kind, where = event["event"], [event.get(key) for key in WHERE]
    if kind == "round_started":
        return RoundState(event["time"], int(event.get("clients", 0)), where)
    if kind in ROUND_ENDS:
        return None
    if current is not None and kind in ANSWERS and where == current.where:
        current.answers[event["client"]] = ANSWERS[kind]
    return current


def _begin(state: RunState, event: RunEvent, names: list[str]) -> None:
    state.phase, state.reason = "running", ""
    state.tasks, state.unit = list(event["tasks"]), str(event.get("unit") or "")
    state.unit_column = str(event.get("unit_column") or "")
    state.assumes = str(event.get("assumes") or "")
    state.planned = sum(stage["rounds"] for stage in event["stages"])
    state.rounds, state.stages = int(event["done_rounds"]), len(event["stages"])
    for name in names:
        state.sites.setdefault(name, SiteState())


def _heard(state: RunState, name: str, event: RunEvent) -> None:
    site = state.sites.setdefault(name, SiteState())
    site.spent = spending_in(event) or site.spent
    if event["event"] != "client_finished":
        site.faults += 1
        site.last_fault = MEANING.get(str(event["reason"]), str(event["reason"]))
        trained = event.get("server_round", 1)  # 0: an evaluation, which leaves out no update
        if event["event"] == "client_failed" and trained and name not in state.quarantined:
            state.quarantined.append(name)
        return
    if name in state.quarantined:  # asked again, and well
        state.quarantined.remove(name)
    site.last_seen, site.task = event["time"], str(event["task"])
    site.rounds += 1


def _told(state: RunState, event: RunEvent, names: list[str]) -> None:
    kind: str = event["event"]
    if kind == "round_started":
        state.stage, state.server_round = event["stage"], event["server_round"]
        state.working, state.quarantined, state.lost = list(event["tasks"]), [], ""
    elif kind == "summed":
        state.summed = int(event["sites"]), int(event["cohort"])
    elif kind == "round_lost":
        state.lost = plain_reason(event["reason"])
    elif kind == "round_finished":
        state.rounds += 1
        state.bytes_up += event["bytes_up"]
        state.bytes_down += event["bytes_down"]
        state.quarantined += [names[int(k)] for k in event["excluded"]]
    elif kind == "round_skipped":
        state.rounds += 1
    elif kind == "evaluated":
        state.accuracy, state.evaluated = dict(event["accuracy"]), int(event.get("stage", -1))
        state.among_all = dict(event.get("class_incremental") or {})
    elif kind == "run_finished":
        state.phase = "finished"
    elif kind == "run_stopped":
        state.phase, state.reason = "stopped", plain_reason(event["reason"])


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
        print_line(console, f"no run yet; next: {folder.command('submit EXPERIMENT')}")
        return
    run = run_folder(folder, name)
    state = state_of(run)
    begun = starts(run)
    continued = bool(begun) and float(begun[-1]["time"]) > state.last_event
    if state.phase == "stopped" and (continued or held(RunFolder(run).writing)):
        state.phase, state.reason = "starting", ""  # it waits for its sites
    if state.phase == "starting" and begun and not fault:
        found = flower_status(folder, begun[-1]["run"])
        if found.startswith("finished"):
            state.phase = "stopped"
            state.reason = f"Flower says '{found}'; superlink.log in the server's folder has more"
    # A run that was stopped on command knows only that its process was told to end.
    told_to_end = state.phase == "stopped" and state.reason in (TOLD_TO_END, KILLED)
    if told_to_end and was_stopped(folder, run):
        state.reason = "by deal stop"
    if as_json:
        told = {"run": run.name, **asdict(state), "connected": sites}
        print(json.dumps(told, indent=1, default=Spending.model_dump))
        return
    for line in described(run.name, state, _deadline(run)):
        print_line(console, line)
    print_sites(console, sites, state, fault)
    print_line(console, next_step(folder, run.name, state))


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
        return f"next: {folder.command(f'submit --resume {name}')}"
    return f"next: wait; {folder.command(f'stop {name}')} ends it and keeps its checkpoint"


def _deadline(run: Path) -> float:
    """How many seconds a round of a run waits for replies; 0: the run's settings cannot be read."""
    try:
        return recorded(run).federation.deadline_seconds
    except UserError:
        return 0.0


def round_line(current: RoundState, number: int, deadline: float, now: float) -> str:
    """Return a round in one line.

    Args:
        current: the round.
        number: of all rounds of the run, from 1.
        deadline: seconds for which it waits for replies; 0: not known.
        now: seconds since 1970.
    """
    counts = Counter(current.answers.values())
    sites = "1 site" if current.asked == 1 else f"{current.asked} sites"
    parts = [f"{sites} asked {span(now - current.since)} ago", f"{counts['replied']} replied"]
    parts += [f"{counts[kind]} {kind}" for kind in ("declined", "failed") if counts[kind]]
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
        last = f"{span(time.time() - site.last_seen)} ago" if site.last_seen else "never"
        row = [name, connections.get(name, "not registered"), last, site.task]
        row += [str(site.rounds), str(site.faults), site.last_fault]
        row += [_cost(site.spent)] if spent else []
        table.add_row(*map(Text, row))  # a site's own words are no markup
    console.print(table)
    for line in epsilon_lines(spent, state.assumes):
        print_line(console, line)
    if fault:
        print_line(console, f"connections unknown: {fault}")


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
