"""Progress for people: one line a round, and what an epsilon means when it is first told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from rich.console import Console

from deal_core.metrics import in_turn, spans
from deal_core.privacy.events import unit_text
from server.folder import site_name
from server.results import EARLIER, VOID, extent, rounded_up, whole_trust
from simulations.output import DASH, print_line

RunEvent = Mapping[str, Any]

LEARNING = "learn"
PHASES = {LEARNING: "training", "prototypes": "class sums", "probe": "sums"}
"""Phase of a stage to what its rounds are."""
IDLE = {
    "no-data": "no example of the task",
    "budget-spent": "its privacy budget is spent",
    "policy": "its policy does not allow what the experiment asks",
    "withheld": "its counts stay where they are",
    "masked": "its update of this round is in another sum",
}
"""Codes of clients that take no part, in words."""
TOLD = {
    "client_failed": "client {client} left out: {reason}",
    "evaluation_lost": "lost, the model stays as it was: {reason}",
    "round_lost": "lost, the model stays as it was: {reason}",
    "step_lost": "lost, the model stays as it was: {reason}",
    "leg_failed": "client {client} missed the leg {leg}: {reason}",
    "client_blamed": "client {by} refuses what client {client} sent it",
    "weight_cut": "client {client} weighs {weight:g}, not what it claimed",
    "counts_cut": "client {client} claims more test rows than count: they are cut",
}
"""Events that are told as they are."""


def told_to(console: Console) -> Callable[[RunEvent], None]:
    """Return what prints the lines of each event that it is given."""
    progress = Progress()

    def listen(event: RunEvent) -> None:
        for line in progress.hear(event):
            print_line(console, line)

    return listen


class Progress:
    """Where a run is: events in, lines out. Nothing here knows a terminal."""

    def __init__(self) -> None:
        """Nothing has begun."""
        self._tasks: list[str] = []
        self._work: list[list[str]] = []
        self._rounds: list[int] = []
        """Of learning, of each stage."""
        self._names: list[str] = []
        """Of clients, by number; empty: they have none."""
        self._asked = 0
        self._losses: list[float] = []
        self._answered = 0
        self._privacy: dict[str, Any] = {}
        """Of ``run_started`` what privacy is of, and the largest that clients have told."""
        self._meaning = ""
        """Of epsilon, as it was said last."""

    def hear(self, event: RunEvent) -> list[str]:
        """Return the lines to print for one more event; of unknown events none."""
        kind = event["event"]
        if kind in TOLD:
            self._charge(event)
            named = {key: site_name(str(event[key]), self._names) for key in CLIENTS & event.keys()}
            return [TOLD[kind].format_map({**event, **named})]
        handler = getattr(self, f"_{kind}", None)
        return [] if handler is None else handler(event) or []

    def _run_started(self, event: RunEvent) -> list[str]:
        self._tasks = list(event["tasks"])
        self._work = [list(stage["tasks"]) for stage in event["stages"]]
        self._rounds = [stage.get("learning", stage["rounds"]) for stage in event["stages"]]
        self._names = list(event.get("sites") or [])
        names = ("unit", "unit_column", "assumes")
        self._privacy = {name: event.get(name) or "" for name in names}
        done, total = event["done_rounds"], sum(stage["rounds"] for stage in event["stages"])
        start = f"resumed after {done} of {total} rounds" if done else "started"
        return [f"{start}: {len(self._tasks)} tasks, {event['clients']} clients"]

    def _checkpoint_damaged(self, event: RunEvent) -> list[str]:
        reason = event["reason"].partition(";")[0]  # without the cure of who has no other
        return [f"resumed from the checkpoint before the last one: {reason}"]

    def _client_idle(self, event: RunEvent) -> list[str]:
        code = event["code"]
        client = site_name(str(event["client"]), self._names)
        return [f"client {client} takes no part: {IDLE.get(code, code)}"]

    def _round_started(self, event: RunEvent) -> None:
        self._asked, self._answered, self._losses = event["clients"], 0, []

    def _client_finished(self, event: RunEvent) -> None:
        self._answered += 1
        if event.get("loss") is not None:
            self._losses.append(event["loss"])
        self._charge(event)

    def _round_finished(self, event: RunEvent) -> list[str]:
        figures = [f"{self._answered}/{self._asked} clients", f"{event['seconds']:.1f} s"]
        if self._losses:
            figures.append(f"loss {fmean(self._losses):.3f}")
        spent, meaning = self._spent()
        told = [meaning] if meaning not in ("", self._meaning) else []
        self._meaning = meaning or self._meaning
        return [", ".join((self._place(event), *figures, *spent)), *told]

    def _evaluated(self, event: RunEvent) -> list[str]:
        accuracy, among_all = event["accuracy"], event.get("class_incremental")
        if event["stage"] < 0:
            return [f"zero-shot accuracy {mean_percent(accuracy, self._tasks)}"]
        ends = zip(self._tasks, spans(self._tasks, self._work)[1], strict=True)
        learnt = [task for task, end in ends if end <= event["stage"]]
        line = (
            f"{len(learnt)} of {len(self._tasks)} tasks learnt, accuracy so far "
            f"{mean_percent(accuracy, learnt)}"
        )
        if among_all:
            line += f", {mean_percent(among_all, learnt)} in Class-IL"
        return [line]

    def _place(self, event: RunEvent) -> str:
        """Return where the run is: ``task 1/2 heart``, or the tasks of a stage, and its round of
        training, or what else the round is of."""
        stage = event["stage"]
        kind = "task" if in_turn(self._tasks, self._work) else "stage"
        where = f"{kind} {stage + 1}/{len(self._work)} {', '.join(self._work[stage])}"
        if event["phase"] != LEARNING:
            return f"{where}, {PHASES.get(event['phase'], event['phase'])}"
        return f"{where}, round {event['server_round']}/{self._rounds[stage]}"

    def _charge(self, event: RunEvent) -> None:
        """Note what a client says that privacy has cost: the largest, and what holds of any."""
        if "epsilon" in event:
            for name in ("epsilon", "delta", *LIMITS):
                told = event.get(name) or 0.0
                self._privacy[name] = max(self._privacy.get(name, 0.0), told)

    def _spent(self) -> tuple[list[str], str]:
        """Return what privacy has cost, and what that means: delta, unit, extent and trust."""
        told = self._privacy
        if "epsilon" not in told or not told["unit"]:
            return [], ""
        more = [VOID] if told["void"] else []
        more += ["simulation only"] if told["simulation_only"] else []
        trust = whole_trust(told["assumes"], bool(told["assumes_more"]))
        over = f"{extent(bool(told['disjoint_tasks']))} so far{EARLIER}"
        return [f"epsilon {rounded_up(told['epsilon'], 3)}"], (
            f"epsilon: at delta {rounded_up(told['delta'], 2)} per "
            f"{unit_text(told['unit'], told['unit_column'])}, over {over}, largest over the "
            f"clients that have answered; {', '.join([trust, *more])}"
        )


def mean_percent(accuracy: Mapping[str, float], tasks: Sequence[str]) -> str:
    """Return ``51.3 %``, the mean over those of the tasks that have one, or a dash."""
    known = [accuracy[task] for task in tasks if task in accuracy]
    return f"{100 * fmean(known):.1f} %" if known else DASH


CLIENTS = {"client", "by"}
"""Fields of events that hold the number of a client."""
LIMITS = ("disjoint_tasks", "simulation_only", "void", "assumes_more")
"""What a client says of its epsilon beside it: true of all where it is of one."""
