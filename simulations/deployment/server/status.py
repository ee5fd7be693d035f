"""``deal status``: what the events of a run say about where it and its sites stand, in lines and a
table, or as JSON."""

import json
import shlex
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console

from deal_core.errors import UserError
from server.folder import RunEvent, RunFolder, held, plain_reason, read_events
from server.results import read_results
from simulations.deployment.keys import expiring
from simulations.deployment.server.folder import ServerFolder, registered
from simulations.deployment.server.submit import flower_status, run_folder, starts
from simulations.engines.flower import CONNECTION
from simulations.output import Table, at_work, print_line, print_table
from simulations.run.run_log import RunLog, round_of
from simulations.run.simulate import recorded

KILLED = "its process has ended without a word: the server was killed or restarted"
ANSWERS = {"client_finished": "replied", "client_idle": "declined", "client_failed": "failed"}
"""Event to what it is counted as in a round."""
ENDS = ("round_finished", "round_skipped", "run_started", "run_stopped", "run_finished")
"""Events after which no round is under way."""
FAULTS = ("client_failed", "reply_dropped", "exchange_failed", "ledger_older")
MEANING = {
    "client reports 'unpinned'": "a peer's key is not pinned there; its log says whose",
    "client reports 'protocol'": "it refuses an exchange of the secure sum; its log says why",
}
"""What Flower has a number for, and a site a word."""
SITS_OUT = {
    "policy": "its policy refuses the experiment (deal site check --experiment FILE, there)",
    "budget-spent": "its privacy budget is spent (deal ledger, there)",
}
"""Codes with which a site takes no part for longer than a task."""


@dataclass
class SiteState:
    """One site in one run."""

    last_seen: float = 0.0  # time of its last valid reply, seconds since 1970; 0: none yet
    rounds: int = 0  # valid updates so far
    faults: int = 0  # rounds without a valid reply, and replies that were dropped
    last_fault: str = ""  # or why it takes no part at all


@dataclass
class RunState:
    """One run."""

    phase: str = "starting"  # or running, stopped, finished
    reason: str = ""  # why it stopped
    stage: int = -1  # that was worked on last, from 0; -1: none yet
    stages: int = 0
    rounds: int = 0  # finished
    planned: int = 0
    working: list[str] = field(default_factory=list)  # tasks of the last round
    asked: int = 0  # sites in the round that is under way; 0: none is
    since: float = 0.0  # when it began, seconds since 1970
    answers: dict[str, str] = field(default_factory=dict)  # client to its last one, of ANSWERS
    left_out: list[str] = field(default_factory=list)  # of the last round, by a check or a rule
    summed: tuple[int, int] | None = None  # sites in the last secure sum, of how many
    lost: str = ""  # why the last round was lost
    last_event: float = 0.0
    sites: dict[str, SiteState] = field(default_factory=dict)


def run_state(events: Iterable[RunEvent]) -> RunState:
    """Return the state that events tell; sites go by their names."""
    log = RunLog(events)
    if not log.of("run_started"):
        return RunState()
    names = [log.name(client) for client in log.clients]
    state = RunState(
        phase={"run_started": "running", "run_stopped": "stopped", "run_finished": "finished"}[
            log.of("run_started", "run_stopped", "run_finished")[-1]["event"]
        ],
        reason=log.stopped,
        stages=len(log.start["stages"]),
        rounds=log.passed,
        planned=log.planned,
        last_event=float(log.events[-1]["time"]),
        sites={name: SiteState() for name in names},
    )
    for summed in log.of("summed")[-1:]:
        state.summed = int(summed["sites"]), int(summed["cohort"])
    for event in log.of("client_idle", "client_finished", "reply_late", "reply_slow", *FAULTS):
        site, kind = state.sites.setdefault(log.name(event["client"]), SiteState()), event["event"]
        if kind == "client_idle":
            site.last_fault = SITS_OUT.get(event.get("code", ""), site.last_fault)
        elif kind == "client_finished":
            site.last_seen, site.rounds = event["time"], site.rounds + 1
        else:
            site.faults += kind in FAULTS
            site.last_fault = MEANING.get(str(event["reason"]), str(event["reason"]))
    starts = [i for i, event in enumerate(log.events) if event["event"] == "round_started"]
    for place in starts[-1:]:
        begun, since = log.events[place], log.events[place + 1 :]
        state.stage, state.working = begun["stage"], list(begun["tasks"])
        if not any(event["event"] in ENDS for event in since):
            state.asked, state.since = int(begun.get("clients", 0)), begun["time"]
        own = [e for e in since if e["event"] in ANSWERS and round_of(e) == round_of(begun)]
        state.answers = {e["client"]: ANSWERS[e["event"]] for e in own}
        state.left_out = [log.name(k) for k, how in state.answers.items() if how == "failed"]
        for event in since:
            if event["event"] == "round_lost":
                state.lost = plain_reason(event["reason"])
            state.left_out += [log.name(k) for k in event.get("excluded", ())]
    return state


def state_of(run: Path) -> RunState:
    """Return the state of a run folder. ``finished`` is a run whose results are there and valid,
    ``running`` one that some process writes."""
    folder = RunFolder(run)
    held_before = held(folder.writing)  # a run that ends from here on has ended in order
    state = run_state(read_events(folder.metrics))
    if state.phase == "running" and not (held_before or held(folder.writing)):
        state.phase, state.reason, state.asked = "stopped", KILLED, 0
    if state.phase == "finished":
        try:
            read_results(run)
        except UserError as error:
            state.phase, state.reason = "stopped", str(error)
    return state


def status(folder: ServerFolder, name: str, console: Console, as_json: bool) -> None:
    """Print where a run and its sites stand; without a name, the latest run."""
    folder.settings()
    with at_work(console, "asking the server"):
        sites, fault = connected(folder)
    run = None if not name and not any(folder.runs.glob("*")) else run_folder(folder, name)
    state = RunState() if run is None else _current_state(folder, run, not fault)
    deadline = 0.0
    if as_json:
        known = {"run": run.name, **asdict(state)} if run else {"run": ""}
        print(json.dumps({**known, "connected": sites}, indent=1))
        return
    next_line = f"no run yet; next: {folder.command('submit EXPERIMENT')}"
    if run is not None:
        with suppress(UserError):  # it has noted no settings yet
            deadline = recorded(run).federation.deadline_seconds
        for line in described(run.name, state, deadline):
            print_line(console, line)
        next_line = next_step(folder, run.name, state)
    print_table(console, site_table(sites, state))
    warnings = [f"warning: {line}" for line in expiring(folder.certificate, folder.authority)]
    unknown = [f"connections unknown: {fault}"] if fault else []
    for line in (*warnings, *unknown, next_line):
        print_line(console, line)


def _current_state(folder: ServerFolder, run: Path, answers: bool) -> RunState:
    state, begun = state_of(run), starts(run)
    continued = bool(begun) and float(begun[-1]["time"]) > state.last_event
    if state.phase == "stopped" and (continued or held(RunFolder(run).writing)):
        state.phase, state.reason = "starting", ""  # it waits for its sites
    if state.phase == "starting" and begun and answers:
        found = flower_status(folder, begun[-1]["run"])
        if found.startswith("finished"):
            state.phase = "stopped"
            state.reason = f"Flower says '{found}'; superlink.log in the server's folder has more"
    return state


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
    """Return the run in a few lines; ``deadline``: for so many seconds a round waits for replies,
    0: it is not known."""
    lines = [f"run {name}: {state.phase}{f' ({state.reason})' if state.reason else ''}"]
    if state.planned:
        place = f"; stage {state.stage + 1} of {state.stages}: {', '.join(state.working) or '-'}"
        place = place if state.stage >= 0 else ""
        lines.append(f"round {state.rounds} of {state.planned} finished{place}")
    if state.asked:
        lines.append(_round_line(state, deadline))
    elif state.phase == "running":
        lines.append("no round is under way: sites evaluate, or the server is at work")
    if state.summed is not None:
        lines.append(
            f"secure sums: the server sees no site's update; the last sum is over "
            f"{state.summed[0]} of {state.summed[1]} sites"
        )
    if state.lost:
        lines.append(f"the last round was lost, the model stayed as it was: {state.lost}")
    if state.left_out:
        lines.append(f"left out of the last round: {', '.join(state.left_out)}")
    return lines


def _round_line(state: RunState, deadline: float) -> str:
    counts, now = Counter(state.answers.values()), time.time()
    sites = "1 site" if state.asked == 1 else f"{state.asked} sites"
    parts = [f"{sites} asked {span(now - state.since)} ago", f"{counts['replied']} replied"]
    parts += [f"{counts[kind]} {kind}" for kind in ("declined", "failed") if counts[kind]]
    left = state.since + deadline - now
    if deadline:
        parts.append(f"deadline in {span(left)}" if left > 0 else "the deadline has passed")
    return f"round {state.rounds + 1}: {', '.join(parts)}"


def next_step(folder: ServerFolder, name: str, state: RunState) -> str:
    """Return what the administrator can do now."""
    if state.phase == "finished":
        run = folder.runs / name
        return f"next: adapter and results.json are in {run}; deal report {shlex.quote(str(run))}"
    if state.phase == "stopped":
        return f"next: {folder.command(f'submit --resume {name}')}"
    return f"next: wait; {folder.command(f'stop {name}')} ends it and keeps its checkpoint"


def site_table(connections: Mapping[str, str], state: RunState) -> Table:
    """Return a row for each site of a run, and each that is registered, with its connection."""
    rows = []
    for name in dict.fromkeys([*state.sites, *connections]):
        site = state.sites.get(name, SiteState())
        last = f"{span(time.time() - site.last_seen)} ago" if site.last_seen else "never"
        known = (name, connections.get(name, "not registered"), last)
        rows.append((*known, str(site.rounds), str(site.faults), site.last_fault))
    columns = ("site", "connection", "last reply", "rounds", "faults", "last fault")
    return Table("Sites", columns, tuple(rows))


def span(seconds: float) -> str:
    """Return a duration in words: seconds below two minutes, else minutes."""
    whole = max(0, round(seconds))
    return f"{whole} s" if whole < 120 else f"{whole // 60} min"
