"""What the events of a run say about where it and its sites stand; the same as figures for
Prometheus, read from the run folders when asked, on this machine only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from deal_core.errors import UserError
from deal_core.privacy.events import unit_text
from server.folder import (
    RunEvent,
    RunFolder,
    held,
    plain_reason,
    read_events,
    site_name,
    without_undone,
)
from server.results import (
    Spending,
    read_results,
    rounded_up,
    spending_in,
    whole_extent,
    whole_trust,
)
from simulations.deployment.server.folder import ServerFolder

ROUND_ENDS = frozenset(
    {"round_finished", "round_skipped", "run_started", "run_finished", "run_stopped"}
)
"""Events after which no round is under way."""
WHERE = ("stage", "phase", "server_round")
FAULTS = ("client_failed", "reply_dropped", "leg_failed")
KILLED = "its process has ended without a word: the server was killed or restarted"
MEANING = {
    "flower error 7": "the app is not allowed there; start runs with deal submit",
    "client reports 'unpinned'": "a peer's key is not pinned there; its log says whose",
    "client reports 'protocol'": "it refuses a leg of the secure sum; its log says why",
}
"""What Flower has a number for, and a site a word."""
SITS_OUT = {
    "policy": "its policy refuses the experiment (deal site check --experiment FILE, there)",
    "budget-spent": "its privacy budget is spent (deal ledger, there)",
}
"""Words by which a site takes no part for longer than a task."""
LATEST = 20
"""Runs that are shown: the newest."""
PHASES = ("starting", "running", "stopped", "finished")


@dataclass
class RoundState:
    """One round, from the event that starts it to the one that ends it.

    Attributes:
        since: when it began, seconds since 1970.
        asked: how many sites it asks.
        where: stage, phase and number within the stage.
        replied: clients with a valid reply.
        declined: clients that take no part in it, by their own rules.
        failed: clients without a valid reply.
    """

    since: float
    asked: int
    where: list[Any]
    replied: list[str] = field(default_factory=list)
    declined: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def hear(self, event: Mapping[str, Any]) -> None:
        """Count a reply to this round; events of others are passed over."""
        kinds = {
            "client_finished": self.replied,
            "client_idle": self.declined,
            "client_failed": self.failed,
        }
        if event["event"] not in kinds or [event.get(key) for key in WHERE] != self.where:
            return
        for clients in kinds.values():  # the last word of a client counts
            if event["client"] in clients:
                clients.remove(event["client"])
        kinds[event["event"]].append(event["client"])


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
    if event["event"] == "round_started":
        where = [event.get(key) for key in WHERE]
        return RoundState(event["time"], int(event.get("clients", 0)), where)
    if event["event"] in ROUND_ENDS:
        return None
    if current is not None:
        current.hear(event)
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


class RunFigures(Collector):
    """Reads the newest runs below ``runs``."""

    def __init__(self, runs: Path) -> None:
        self._runs = runs

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Yield one family per figure."""
        folders = sorted(self._runs.glob("*"), key=lambda p: p.stat().st_mtime)[-LATEST:]
        states = {folder.name: state_of(folder) for folder in folders if folder.is_dir()}
        yield from _of_runs(states)
        yield from _of_sites(states)


def _of_runs(states: dict[str, RunState]) -> Iterator[GaugeMetricFamily]:
    figures: dict[str, tuple[str, Callable[[RunState], float]]] = {
        "rounds_finished": ("rounds that have finished", lambda s: s.rounds),
        "rounds_planned": ("rounds of the whole run", lambda s: s.planned),
        "stage": ("stage, from 0", lambda s: s.stage),
        "bytes_up": ("payload sent, mean per site", lambda s: s.bytes_up),
        "bytes_down": ("payload received, mean per site", lambda s: s.bytes_down),
        "quarantined": ("sites left out of the last round", lambda s: len(s.quarantined)),
        "last_event_seconds": ("time of the last event", lambda s: s.last_event),
    }
    for name, (text, value) in figures.items():
        family = GaugeMetricFamily(f"deal_run_{name}", text, labels=["run"])
        for run, state in states.items():
            family.add_metric([run], float(value(state)))
        yield family
    phases = GaugeMetricFamily(
        "deal_run_phase", "1 for the phase it is in", labels=["run", "phase"]
    )
    accuracy = GaugeMetricFamily("deal_run_accuracy", "0 to 1", labels=["run", "task"])
    among_all = GaugeMetricFamily(
        "deal_run_accuracy_among_all",
        "0 to 1, among all labels seen so far",
        labels=["run", "task"],
    )
    for run, state in states.items():
        for phase in PHASES:
            phases.add_metric([run, phase], float(state.phase == phase))
        for task, share in state.accuracy.items():
            accuracy.add_metric([run, task], share)
        for task, share in state.among_all.items():
            among_all.add_metric([run, task], share)
    yield phases
    yield accuracy
    yield among_all


def _of_sites(states: dict[str, RunState]) -> Iterator[GaugeMetricFamily]:
    figures: dict[str, tuple[str, Callable[[SiteState], float | None]]] = {
        "last_reply_seconds": ("time of the last valid reply", lambda s: s.last_seen),
        "rounds": ("valid updates", lambda s: s.rounds),
        "faults": ("rounds without a valid reply, and dropped replies", lambda s: s.faults),
    }
    for name, (text, value) in figures.items():
        family = GaugeMetricFamily(f"deal_site_{name}", text, labels=["run", "site"])
        for run, state in states.items():
            for named, site in state.sites.items():
                figure = value(site)
                if figure is not None:
                    family.add_metric([run, named], float(figure))
        yield family
    yield _spending(states)


def _spending(states: dict[str, RunState]) -> GaugeMetricFamily:
    """An epsilon says nothing without its labels."""
    text = "privacy spent so far, where a site tells it"
    labels = ["run", "site", "delta", "unit", "over", "assumes", "void", "simulation_only"]
    family = GaugeMetricFamily("deal_site_epsilon", text, labels=labels)
    for run, state in states.items():
        for name, site in state.sites.items():
            if site.spent is not None:
                spent, seeded = site.spent, str(site.spent.simulation_only).lower()
                over = whole_extent(spent.disjoint_tasks)
                trust = whole_trust(state.assumes, spent.assumes_more)
                unit = unit_text(state.unit, state.unit_column)
                delta, void = rounded_up(spent.delta, 2), str(spent.void).lower()
                own = [run, name, delta, unit, over, trust, void, seeded]
                family.add_metric(own, spent.epsilon)
    return family


def serve(folder: ServerFolder, port: int) -> None:
    """Answer on ``http://127.0.0.1:PORT/metrics`` from a thread of this process."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(RunFigures(folder.runs))
    start_http_server(port, addr="127.0.0.1", registry=registry)
