"""What the log of a run says, in a simulation and in a deployment: of its rounds and clients, and
line by line for people."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from rich.console import Console

from deal_core.metrics import in_turn, spans
from deal_core.privacy.events import unit_text
from server.folder import RunEvent, plain_reason, site_name
from server.results import EARLIER, VOID, extent, rounded_up, whole_trust
from simulations.engines import stop_if_asked
from simulations.output import DASH, print_line

RoundKey = tuple[int, str, int]
"""Stage, phase, and number of the round within the stage; 0: an evaluation."""


@dataclass(frozen=True)
class Round:
    """A round that has ended, or its part so far (``seconds`` is None)."""

    number: int
    """In the whole run, from 1."""
    stage: int
    """From 0."""
    phase: str
    tasks: list[str]
    asked: int
    """Clients."""
    used: int
    """Replies."""
    loss: float | None
    """Mean over the clients whose replies are used, or that of a secure sum."""
    error: float | None
    """Of the aggregation; None: nothing was aggregated."""
    seconds: float | None
    bytes_up: float | None
    """Mean per client."""
    bytes_down: float | None


class RunLog:
    """The events of a run; a round that was played again after a resume counts once, as it went the
    last time."""

    def __init__(self, events: Iterable[RunEvent]) -> None:
        """Take events in their order."""
        starts, last, kept = 0, dict[RoundKey, int](), []
        for event in events:
            starts += event["event"] == "run_started"
            if "server_round" in event:
                last[round_of(event)] = starts
            kept.append((starts, event))
        self.events = [
            e for start, e in kept if "server_round" not in e or start == last[round_of(e)]
        ]

    def of(self, *kinds: str) -> list[RunEvent]:
        """Return the events of some kinds."""
        return [event for event in self.events if event["event"] in kinds]

    @cached_property
    def start(self) -> RunEvent:
        """The last start: tasks, stages, number of clients, names of sites."""
        return self.of("run_started")[-1]

    @property
    def planned(self) -> int:
        """Rounds of the whole run."""
        return sum(int(stage["rounds"]) for stage in self.start["stages"])

    @property
    def stopped(self) -> str:
        """Why it has stopped since it was last started; empty: it has not."""
        last = (self.of("run_started", "run_stopped") or [{"event": ""}])[-1]
        if last["event"] != "run_stopped":
            return ""
        return reason_in(last) or "no reason was logged"

    def name(self, client: object) -> str:
        """Return the site's name of a client's number; the number itself in a simulation."""
        return site_name(str(client), self.start.get("sites") or [])

    @property
    def clients(self) -> list[str]:
        """The numbers of all clients."""
        return [str(number) for number in range(self.start["clients"])]

    @cached_property
    def replies(self) -> dict[RoundKey, dict[str, RunEvent]]:
        """Round to client to the event that says how its reply ended: ``client_finished`` or
        ``client_failed``, the later one where it was asked again."""
        found: dict[RoundKey, dict[str, RunEvent]] = {}
        for event in self.of("client_finished", "client_failed"):
            found.setdefault(round_of(event), {})[str(event["client"])] = event
        return found

    @cached_property
    def excluded(self) -> set[tuple[RoundKey, str]]:
        """Round and client of each reply that a robust step has left out."""
        return {
            (round_of(end), str(client))
            for end in self.of("round_finished")
            for client in end.get("excluded", [])
        }

    @cached_property
    def label_records(self) -> list[int]:
        """Of each label whose records were added up, over all clients, about so many."""
        return [max(1, number) for event in self.of("class_sums") for number in event["records"]]

    @cached_property
    def rounds(self) -> list[Round]:
        """All that have begun, in their order."""
        ends = {round_of(event): event for event in self.of("round_finished")}
        summed = {round_of(event): float(event["loss"]) for event in self.of("loss_summed")}
        found = []
        for begun in self.of("round_started"):
            key = round_of(begun)
            end, replies = ends.get(key, {}), self.replies.get(key, {}).items()
            good = {client: e for client, e in replies if e["event"] == "client_finished"}
            losses = [float(e["loss"]) for e in good.values() if e.get("loss") is not None]
            loss = fmean(losses) if losses else None
            found.append(
                Round(
                    number=begun["round"],
                    stage=begun["stage"],
                    phase=begun["phase"],
                    tasks=list(begun["tasks"]),
                    asked=int(begun["clients"]),
                    used=sum((key, client) not in self.excluded for client in good),
                    loss=summed.get(key, loss),
                    error=end.get("aggregation_error"),
                    seconds=end.get("seconds"),
                    bytes_up=end.get("bytes_up"),
                    bytes_down=end.get("bytes_down"),
                )
            )
        return found

    @property
    def done(self) -> list[Round]:
        """Rounds that have ended."""
        return [each for each in self.rounds if each.seconds is not None]

    @property
    def passed(self) -> int:
        """Rounds that have ended or were skipped."""
        return len(self.done) + len(self.of("round_skipped"))


def round_of(event: RunEvent) -> RoundKey:
    """Return the round that an event is of."""
    return (event["stage"], event["phase"], event["server_round"])


def reason_in(event: RunEvent) -> str:
    """Return the reason that an event gives on one line, without the name of the error."""
    first = plain_reason(event.get("reason", event.get("code", "")))
    return "interrupted" if first.startswith("KeyboardInterrupt") else first


LEARNING = "learn"
PHASES = {LEARNING: "training", "prototypes": "class sums", "probe": "sums"}
"""Phase of a stage to what its rounds are."""
IDLE = {
    "no-data": "no example of the task",
    "budget-spent": "its privacy budget is spent",
    "policy": "its policy does not allow what the experiment asks",
    "withheld": "its counts stay where they are",
    "masked": "its update of this round is in another sum",
    "unpinned": "it knows no key of some other site, and keeps its class sums (deal site check)",
}
"""Codes of clients that take no part, in words."""
TOLD = {
    "client_failed": "client {client} left out: {reason}",
    "evaluation_lost": "lost, the model stays as it was: {reason}",
    "round_lost": "lost, the model stays as it was: {reason}",
    "step_lost": "lost, the model stays as it was: {reason}",
    "exchange_failed": "client {client} missed the exchange {exchange}: {reason}",
    "client_blamed": "client {by} refuses what client {client} sent it",
    "weight_cut": "client {client} weighs {weight:g}, not what it claimed",
    "counts_cut": "client {client} claims more test rows than count: they are cut",
    "sums_left_out": "class sums of {task} are of fewer than three clients, and left out",
    "class_means_doubted": "{by} of {of} clients answer worse with new class means",
    "class_means_rejected": "new class means are left out",
}
"""Events that are told as they are."""


def told_to(console: Console, say: Callable[..., None]) -> Callable[[RunEvent], None]:
    """Return what prints the lines of each event that it is given, and says what goes on then
    (:func:`simulations.output.at_work`).

    Raises:
        KeyboardInterrupt: the run was asked to stop, and goes on.
    """
    progress = Progress()

    def listen(event: RunEvent) -> None:
        lines = progress.hear(event)
        for line in lines:
            print_line(console, line)
        if progress.now and not lines:
            say(progress.now, progress.how_far)
        if event["event"] != "run_stopped":
            stop_if_asked()

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
        self.now = ""
        """What goes on after the last event; empty: nothing is known of it."""
        self._asked = 0
        self._losses: list[float] = []
        self._answered = 0
        self._loading = False
        """No client has answered since the start."""
        self._accuracy: dict[str, float] = {}
        self._among_all: dict[str, float] = {}
        """Of each task as it was last evaluated."""
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

    @property
    def how_far(self) -> str:
        """Of what goes on now."""
        if self._loading:
            return "loading the model"
        return f"{self._answered} of {self._asked} clients"

    def _run_started(self, event: RunEvent) -> list[str]:
        self._loading = True
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
        self.now = f"{self._where(event)}: {PHASES.get(event['phase'], event['phase'])}"

    def _evaluation_started(self, event: RunEvent) -> None:
        self._asked, self._answered = event["clients"], 0
        after = f"{self._where(event)}: evaluation"
        self.now = "zero-shot evaluation" if event["stage"] < 0 else after

    def _client_evaluated(self, event: RunEvent) -> None:
        self._answered, self._loading = self._answered + 1, False

    def _client_finished(self, event: RunEvent) -> None:
        self._client_evaluated(event)
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
        own, all_own = event["accuracy"], event.get("class_incremental") or {}
        if not own:  # the counts are not known; else they are of all tasks, or of some
            self._accuracy, self._among_all = {}, {}
        accuracy = self._accuracy = {**self._accuracy, **own}
        among_all = self._among_all = {**self._among_all, **all_own}
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
        if event["phase"] != LEARNING:
            return f"{self._where(event)}, {PHASES.get(event['phase'], event['phase'])}"
        total = self._rounds[event["stage"]]
        return f"{self._where(event)}, round {event['server_round']}/{total}"

    def _where(self, event: RunEvent) -> str:
        stage, kind = event["stage"], "task" if in_turn(self._tasks, self._work) else "stage"
        return f"{kind} {stage + 1}/{len(self._work)} {', '.join(self._work[stage])}"

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
