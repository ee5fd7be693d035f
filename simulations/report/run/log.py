"""What the events of a run say: rounds, clients, evaluations, faults. The server's own log, of a
simulation and of a deployment alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from server.checkpoint import EVERYBODY
from server.folder import plain_reason, site_name
from server.results import Spending, spending_told

RunEvent = Mapping[str, Any]

FAULTS = {
    "client_failed": "reply not used",
    "reply_dropped": "reply dropped",
    "client_blamed": "blamed by another client",
    "weight_cut": "weight cut",
    "counts_cut": "test rows cut",
    "client_idle": "took no part",
    "evaluation_lost": "evaluation lost",
    "round_lost": "round lost",
    "step_lost": "step lost",
    "checkpoint_damaged": "checkpoint damaged",
    "adapter_missing": "adapter not handed over",
    "run_stopped": "run stopped",
}
"""Events that a reader asks after, in words."""


@dataclass
class RoundLog:
    """One round.

    Attributes:
        number: in the whole run, from 1.
        stage: from 0.
        tasks: worked on.
        asked, answered: clients.
        seconds: of the round, with the waiting; None: it has not ended.
        losses: client to its loss, of those that said theirs and were not refused; or one, the
            mean in a secure sum.
        error: of the aggregation; None: nothing was aggregated.
        bytes_up, bytes_down: mean per client.
        excluded: clients that a robust step has left out.
    """

    number: int
    stage: int
    phase: str
    tasks: list[str] = field(default_factory=list)
    asked: int = 0
    answered: int = 0
    seconds: float | None = None
    losses: dict[str, float] = field(default_factory=dict)
    error: float | None = None
    bytes_up: float | None = None
    bytes_down: float | None = None
    excluded: list[str] = field(default_factory=list)

    @property
    def loss(self) -> float | None:
        """Mean over clients."""
        return sum(self.losses.values()) / len(self.losses) if self.losses else None


RoundKey = tuple[int, str, int]
"""Stage, phase, and number of the round within the stage; 0: an evaluation."""


@dataclass
class ClientLog:
    """One client.

    Attributes:
        replies: round to the seconds that its valid reply took there.
        examples: task to the number of training examples, as the client says it.
        faults: rounds and evaluations whose reply did not come, or failed a check.
        excluded: rounds whose reply a robust step has left out.
        idle: round to the code of the reason for which the client took no part.
        spent: on privacy, in all that its ledger holds; None: it does not say.
    """

    name: str
    replies: dict[RoundKey, float] = field(default_factory=dict)
    examples: dict[str, float] = field(default_factory=dict)
    faults: set[RoundKey] = field(default_factory=set)
    excluded: set[RoundKey] = field(default_factory=set)
    idle: dict[RoundKey, str] = field(default_factory=dict)
    spent: Spending | None = None

    @property
    def left_out(self) -> int:
        """Replies that were not used, for whatever reason."""
        return len(self.faults) + len(self.excluded)

    def forget(self, key: RoundKey) -> None:
        """Take back all that was said of a round."""
        self.replies.pop(key, None)
        self.idle.pop(key, None)
        self.faults.discard(key)
        self.excluded.discard(key)


@dataclass(frozen=True)
class FaultLog:
    """Something that a reader asks after.

    Attributes:
        key: of the round; None: it is of none.
        again: the round was played again after it, and counts as it went then.
    """

    time: float
    round: int
    what: str
    client: str
    why: str
    key: RoundKey | None = None
    again: bool = False


@dataclass
class RunLog:
    """What all events say together.

    Attributes:
        stages: tasks of each stage, and its rounds.
        skipped: rounds in which nothing was to be done.
        evaluations: stage, from 0, to accuracy by task; -1: before any training.
        among_all: the same among all labels seen so far.
        starts: times; the second and the others continue the first.
        played: round to the number of the start that it was last played after.
        stopped: why, if it has stopped since it was last started; empty: it has not.
    """

    tasks: list[str] = field(default_factory=list)
    stages: list[tuple[list[str], int]] = field(default_factory=list)
    sites: list[str] = field(default_factory=list)
    rounds: dict[RoundKey, RoundLog] = field(default_factory=dict)
    skipped: set[RoundKey] = field(default_factory=set)
    clients: dict[str, ClientLog] = field(default_factory=dict)
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    among_all: dict[int, dict[str, float]] = field(default_factory=dict)
    faults: list[FaultLog] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    played: dict[RoundKey, int] = field(default_factory=dict)
    ended: float = 0.0
    stopped: str = ""

    @property
    def planned(self) -> int:
        """Rounds of the whole run."""
        return sum(rounds for _, rounds in self.stages)

    @property
    def done(self) -> list[RoundLog]:
        """Rounds that have ended, in their order."""
        return [each for each in self.rounds.values() if each.seconds is not None]

    @property
    def passed(self) -> int:
        """Rounds that have ended or were skipped."""
        return len(self.done) + len(self.skipped)

    def name(self, client: str) -> str:
        """Return the site's name of a client's number; the number itself in a simulation."""
        return site_name(client, self.sites)


def read_log(events: Iterable[RunEvent]) -> RunLog:
    """Return what the events say; what is unknown changes nothing. A round that was played again
    after a resume counts once, as it went the last time."""
    log = RunLog()
    for event in events:
        log.ended = event["time"]
        if "server_round" in event:
            _play(log, _key(event))
        if event["event"] in FAULTS:
            _fault(log, event)
        handler = HANDLERS.get(event["event"])
        if handler is not None:
            handler(log, event)
    return log


def _play(log: RunLog, key: RoundKey) -> None:
    """A round that is met after a later start is played again: it was killed before its
    checkpoint."""
    if log.played.get(key, len(log.starts)) != len(log.starts):
        for client in log.clients.values():
            client.forget(key)
        log.skipped.discard(key)
        if key in log.rounds:  # in its place: rounds are in their order
            log.rounds[key] = RoundLog(log.rounds[key].number, *key[:2])
        log.faults = [replace(f, again=True) if f.key == key else f for f in log.faults]
    log.played[key] = len(log.starts)


def _fault(log: RunLog, event: RunEvent) -> None:
    if event["event"] == "client_idle" and event.get("code") == "no-data":
        return  # by the division of the data, and no fault
    why = event.get("reason", event.get("code", ""))
    if event["event"] == "weight_cut":
        why = f"weighs {event['weight']:g}, not what it claimed"
    if event["event"] == "counts_cut":
        why = f"claimed more test rows than count, of {', '.join(event['tasks'])}"
    client = str(event.get("client", ""))
    number = event.get("round") or _number(log, event)
    key = _key(event) if "server_round" in event else None
    what = FAULTS[event["event"]]
    log.faults.append(FaultLog(event["time"], number, what, log.name(client), plain(why), key))


def _number(log: RunLog, event: RunEvent) -> int:
    """Return the number of the round in the whole run; older logs count within a stage."""
    before = sum(rounds for _, rounds in log.stages[: max(0, event.get("stage", 0))])
    return before + int(event.get("server_round", 0))


def plain(reason: object) -> str:
    """Return a reason on one line, without the name of the error."""
    first = plain_reason(reason)
    return "interrupted" if first.startswith("KeyboardInterrupt") else first


def _started(log: RunLog, event: RunEvent) -> None:
    log.tasks, log.sites = list(event["tasks"]), list(event.get("sites") or [])
    log.stages = [(list(stage["tasks"]), int(stage["rounds"])) for stage in event["stages"]]
    log.starts.append(event["time"])
    log.stopped = ""
    for number in range(event["clients"]):
        client = log.name(str(number))
        log.clients.setdefault(client, ClientLog(client))


def _key(event: RunEvent) -> RoundKey:
    return (event["stage"], event["phase"], event["server_round"])


def _round(log: RunLog, event: RunEvent) -> RoundLog:
    key = _key(event)
    if key not in log.rounds:
        number = event.get("round") or _number(log, event)
        log.rounds[key] = RoundLog(number, event["stage"], event["phase"])
    return log.rounds[key]


def _round_started(log: RunLog, event: RunEvent) -> None:
    one = _round(log, event)
    one.tasks, one.asked = list(event["tasks"]), int(event["clients"])


def _client_finished(log: RunLog, event: RunEvent) -> None:
    one, client = _round(log, event), _client(log, event)
    one.answered += 1
    client.faults.discard(_key(event))  # asked again, and well
    if event.get("loss") is not None:
        one.losses[str(event["client"])] = float(event["loss"])
    client.replies[_key(event)] = float(event.get("seconds", 0.0))
    if "num_examples" in event:
        client.examples[str(event["task"])] = float(event["num_examples"])
    client.spent = spending_told(event) or client.spent


def _loss_summed(log: RunLog, event: RunEvent) -> None:
    _round(log, event).losses[EVERYBODY] = float(event["loss"])


def _round_finished(log: RunLog, event: RunEvent) -> None:
    one = _round(log, event)
    one.seconds, one.error = event["seconds"], event.get("aggregation_error")
    one.bytes_up, one.bytes_down = event.get("bytes_up"), event.get("bytes_down")
    one.excluded = [log.name(str(client)) for client in event.get("excluded", [])]
    for name in one.excluded:
        log.clients.setdefault(name, ClientLog(name)).excluded.add(_key(event))


def _round_skipped(log: RunLog, event: RunEvent) -> None:
    log.skipped.add(_key(event))


def _client_failed(log: RunLog, event: RunEvent) -> None:
    client = _client(log, event)
    if _key(event) in log.rounds:  # perhaps when its update was held beside the others
        log.rounds[_key(event)].losses.pop(str(event["client"]), None)
    client.faults.add(_key(event))
    client.spent = spending_told(event) or client.spent


def _client_idle(log: RunLog, event: RunEvent) -> None:
    _client(log, event).idle[_key(event)] = str(event["code"])


def _client(log: RunLog, event: RunEvent) -> ClientLog:
    name = log.name(str(event["client"]))
    return log.clients.setdefault(name, ClientLog(name))


def _evaluated(log: RunLog, event: RunEvent) -> None:
    log.evaluations[event["stage"]] = dict(event["accuracy"])
    log.among_all[event["stage"]] = dict(event.get("class_incremental") or {})


def _stopped(log: RunLog, event: RunEvent) -> None:
    log.stopped = plain(event["reason"]) or "without a word"


HANDLERS: Mapping[str, Callable[[RunLog, RunEvent], None]] = {
    "run_started": _started,
    "round_started": _round_started,
    "client_finished": _client_finished,
    "loss_summed": _loss_summed,
    "round_finished": _round_finished,
    "round_skipped": _round_skipped,
    "client_failed": _client_failed,
    "client_idle": _client_idle,
    "evaluated": _evaluated,
    "run_stopped": _stopped,
}
