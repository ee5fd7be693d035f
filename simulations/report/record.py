"""What the folder of a run says: its results, or what the server's own log has told so far. Runs of
a simulation and of a deployment are alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from server.folder import RunFolder, held, plain_reason, read_events, site_name
from server.measures import EVERYBODY, privacy_of
from server.results import Privacy, Results, Spending, read_results, spending_in
from simulations.run.run_folder import RECORD, recorded

RunEvent = Mapping[str, Any]
Rows = Sequence[Sequence[float | None]]
State = Literal["finished", "running", "stopped"]

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

RoundKey = tuple[int, str, int]
"""Stage, phase, and number of the round within the stage; 0: an evaluation."""


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
        excluded: how many clients a robust step has left out.
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
    excluded: int = 0

    @property
    def loss(self) -> float | None:
        """Mean over clients."""
        return sum(self.losses.values()) / len(self.losses) if self.losses else None


@dataclass
class ClientLog:
    """One client.

    Attributes:
        replies: round to the seconds that its valid reply took there.
        examples: task to the number of training examples, as the client says it.
        faults: rounds and evaluations whose reply did not come, or failed a check.
        excluded: replies that a robust step has left out.
        idle: code of the reason to the rounds in which it took no part.
    """

    replies: dict[RoundKey, float] = field(default_factory=dict)
    examples: dict[str, float] = field(default_factory=dict)
    faults: set[RoundKey] = field(default_factory=set)
    excluded: int = 0
    idle: Counter[str] = field(default_factory=Counter)

    @property
    def left_out(self) -> int:
        """Replies that were not used."""
        return len(self.faults) + self.excluded


@dataclass(frozen=True)
class Fault:
    """Something that a reader asks after; ``round`` 0: it is of no round."""

    time: float
    round: int
    what: str
    client: str
    why: str


@dataclass
class RunLog:
    """What all events say together.

    Attributes:
        stages: tasks of each stage, and its rounds.
        clients: by name.
        skipped: rounds in which nothing was to be done.
        evaluations: stage, from 0, to accuracy by task; -1: before any training.
        class_il: the same among all labels seen so far.
        spent: client's number to what it has spent on privacy, in all that its ledger holds.
        starts: how often it was started or resumed.
        stopped: why, if it has stopped since it was last started; empty: it has not.
    """

    tasks: list[str] = field(default_factory=list)
    stages: list[tuple[list[str], int]] = field(default_factory=list)
    sites: list[str] = field(default_factory=list)
    rounds: dict[RoundKey, RoundLog] = field(default_factory=dict)
    skipped: int = 0
    clients: dict[str, ClientLog] = field(default_factory=dict)
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    class_il: dict[int, dict[str, float]] = field(default_factory=dict)
    spent: dict[str, Spending] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    starts: int = 0
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
        return len(self.done) + self.skipped

    def name(self, client: object) -> str:
        """Return the site's name of a client's number; the number itself in a simulation."""
        return site_name(str(client), self.sites)

    def client(self, client: object) -> ClientLog:
        """Return what is known of a client by its number."""
        return self.clients.setdefault(self.name(client), ClientLog())


def read_log(events: Iterable[RunEvent]) -> RunLog:
    """Return what the events say; what is unknown changes nothing."""
    log = RunLog()
    for event in _last_played(events):
        log.ended = event["time"]
        kind = event["event"]
        if kind in FAULTS:
            _fault(log, event)
        if kind == "run_started":
            _started(log, event)
        elif kind == "evaluated":
            log.evaluations[event["stage"]] = dict(event["accuracy"])
            log.class_il[event["stage"]] = dict(event.get("class_incremental") or {})
        elif kind == "round_skipped":
            log.skipped += 1
        elif kind == "run_stopped":
            log.stopped = _plain(event["reason"]) or "no reason was logged"
        elif kind.startswith("client_"):
            _of_client(log, event)
        elif kind in ("round_started", "loss_summed", "round_finished"):
            _of_round(_round(log, event), log, event)
    return log


def _last_played(events: Iterable[RunEvent]) -> list[RunEvent]:
    """Return the events without those of rounds that were played again after a resume: each counts
    once, as it went the last time."""
    starts, last, kept = 0, {}, []
    for event in events:
        starts += event["event"] == "run_started"
        if "server_round" in event:
            last[_key(event)] = starts
        kept.append((starts, event))
    return [e for start, e in kept if "server_round" not in e or start == last[_key(e)]]


def _key(event: RunEvent) -> RoundKey:
    return (event["stage"], event["phase"], event["server_round"])


def _round(log: RunLog, event: RunEvent) -> RoundLog:
    new = RoundLog(event["round"], event["stage"], event["phase"])
    return log.rounds.setdefault(_key(event), new)


def _started(log: RunLog, event: RunEvent) -> None:
    log.tasks, log.sites = list(event["tasks"]), list(event.get("sites") or [])
    log.stages = [(list(stage["tasks"]), int(stage["rounds"])) for stage in event["stages"]]
    log.starts += 1
    log.stopped = ""
    for number in range(event["clients"]):
        log.client(number)


def _of_round(one: RoundLog, log: RunLog, event: RunEvent) -> None:
    if event["event"] == "round_started":
        one.tasks, one.asked = list(event["tasks"]), int(event["clients"])
    elif event["event"] == "loss_summed":
        one.losses[EVERYBODY] = float(event["loss"])
    else:
        one.seconds, one.error = event["seconds"], event.get("aggregation_error")
        one.bytes_up, one.bytes_down = event.get("bytes_up"), event.get("bytes_down")
        one.excluded = len(event.get("excluded", []))
        for client in event.get("excluded", []):
            log.client(client).excluded += 1


def _of_client(log: RunLog, event: RunEvent) -> None:
    number, kind = str(event["client"]), event["event"]
    client = log.client(number)
    if kind == "client_idle":
        client.idle[str(event["code"])] += 1
    elif kind == "client_failed":
        client.faults.add(_key(event))
        if _key(event) in log.rounds:  # perhaps when its update was held beside the others
            log.rounds[_key(event)].losses.pop(number, None)
    elif kind == "client_finished":
        one = _round(log, event)
        one.answered += 1
        client.faults.discard(_key(event))  # asked again, and well
        client.replies[_key(event)] = float(event.get("seconds", 0.0))
        if event.get("loss") is not None:
            one.losses[number] = float(event["loss"])
        if "num_examples" in event:
            client.examples[str(event["task"])] = float(event["num_examples"])
    spent = spending_in(event)
    if spent is not None:
        log.spent[number] = spent


def _fault(log: RunLog, event: RunEvent) -> None:
    if event["event"] == "client_idle" and event.get("code") == "no-data":
        return  # by the division of the data, and no fault
    why = event.get("reason", event.get("code", ""))
    if event["event"] == "weight_cut":
        why = f"weighs {event['weight']:g}, not what it claimed"
    if event["event"] == "counts_cut":
        why = f"claimed more test rows than count, of {', '.join(event['tasks'])}"
    client = log.name(event.get("client", ""))
    what = FAULTS[event["event"]]
    log.faults.append(Fault(event["time"], event.get("round", 0), what, client, _plain(why)))


def _plain(reason: object) -> str:
    """Return a reason on one line, without the name of the error."""
    first = plain_reason(reason)
    return "interrupted" if first.startswith("KeyboardInterrupt") else first


@dataclass(frozen=True)
class RunRecord:
    """What the folder of a run says; ``results`` is None of one that has not finished."""

    folder: Path
    experiment: Experiment
    log: RunLog
    results: Results | None
    state: State

    @property
    def tasks(self) -> list[str]:
        """In the stream's order."""
        return self.results.tasks if self.results else self.log.tasks

    @property
    def stages(self) -> list[list[str]]:
        """Tasks worked on in each stage, those to come included."""
        if self.results:
            return [list(stage.work) for stage in self.results.stages]
        return [tasks for tasks, _ in self.log.stages]

    @property
    def matrix(self) -> Rows:
        """Task-IL accuracy after each stage that was evaluated, on each task; None: not known."""
        return self.results.accuracy_matrix if self.results else self._rows(self.log.evaluations)

    @property
    def class_il(self) -> Rows:
        """The same among all labels seen so far; empty: not known."""
        if self.results:
            found = self.results.class_incremental
            return found.accuracy_matrix if found else []
        rows = self._rows(self.log.class_il)
        return rows if any(value is not None for row in rows for value in row) else []

    def _rows(self, evaluations: Mapping[int, Mapping[str, float]]) -> Rows:
        stages = range(max(evaluations, default=-1) + 1)
        return [[evaluations.get(i, {}).get(task) for task in self.tasks] for i in stages]

    @property
    def zero_shot(self) -> list[float | None]:
        """Accuracy before any training, on each task; None: not known."""
        found = self.results.zero_shot if self.results else self.log.evaluations.get(-1, {})
        return [found.get(task) for task in self.tasks]

    @property
    def privacy(self) -> Privacy:
        """What was spent, at the end or so far."""
        return self.results.privacy if self.results else privacy_of(self.experiment, self.log.spent)


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, begun at least."""
    run = RunFolder(folder)
    return any(path.is_file() for path in (run.results, run.metrics, folder / RECORD))


def read_run(folder: Path) -> RunRecord:
    """Return what the folder of a run says.

    Raises:
        UserError: its files cannot be read, or it has not begun.
    """
    run = RunFolder(folder)
    results = read_results(folder) if run.results.is_file() else None
    experiment = results.config if results else recorded(folder)
    try:
        log = read_log(read_events(run.metrics))
    except (ValueError, KeyError, TypeError, OSError, ValidationError) as error:
        raise UserError(f"{run.metrics}: cannot be read ({error})") from None
    if results is None and not log.starts:
        raise UserError(f"{folder}: the run has not begun, there is nothing to report")
    state: State = "finished" if results else "running" if held(run.writing) else "stopped"
    return RunRecord(folder, experiment, log, results, state)
