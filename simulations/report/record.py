"""What the folder of a run says: its results, or what the server's own log has told so far. Runs of
a simulation and of a deployment are alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Literal

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from server.folder import RunEvent, RunFolder, held, plain_reason, read_events, site_name
from server.measures import privacy_of
from server.results import Privacy, Results, read_results, spending_in
from simulations.run.run_folder import RECORD, recorded

Rows = Sequence[Sequence[float | None]]
State = Literal["finished", "running", "stopped"]
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
        self.events = _last_played(events)

    def of(self, *kinds: str) -> list[RunEvent]:
        """Return the events of some kinds."""
        return [event for event in self.events if event["event"] in kinds]

    @property
    def starts(self) -> int:
        """How often the run was started or resumed."""
        return len(self.of("run_started"))

    @cached_property
    def start(self) -> RunEvent:
        """The last start: tasks, stages, number of clients, names of sites."""
        return self.of("run_started")[-1]

    @property
    def stages(self) -> list[list[str]]:
        """The tasks worked on in each stage."""
        return [list(stage["tasks"]) for stage in self.start["stages"]]

    @property
    def planned(self) -> int:
        """Rounds of the whole run."""
        return sum(int(stage["rounds"]) for stage in self.start["stages"])

    @property
    def skipped(self) -> int:
        """Rounds in which nothing was to be done."""
        return len(self.of("round_skipped"))

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
            found.setdefault(_key(event), {})[str(event["client"])] = event
        return found

    @cached_property
    def excluded(self) -> set[tuple[RoundKey, str]]:
        """Round and client of each reply that a robust step has left out."""
        return {
            (_key(end), str(client))
            for end in self.of("round_finished")
            for client in end.get("excluded", [])
        }

    @cached_property
    def rounds(self) -> list[Round]:
        """All that have begun, in their order."""
        ends = {_key(event): event for event in self.of("round_finished")}
        summed = {_key(event): float(event["loss"]) for event in self.of("loss_summed")}
        found = []
        for begun in self.of("round_started"):
            key, replies = _key(begun), self.replies.get(_key(begun), {})
            end = ends.get(key, {})
            good = {
                client: event
                for client, event in replies.items()
                if event["event"] == "client_finished"
            }
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
        return len(self.done) + self.skipped


def _last_played(events: Iterable[RunEvent]) -> list[RunEvent]:
    starts, last, kept = 0, {}, []
    for event in events:
        starts += event["event"] == "run_started"
        if "server_round" in event:
            last[_key(event)] = starts
        kept.append((starts, event))
    return [e for start, e in kept if "server_round" not in e or start == last[_key(e)]]


def _key(event: RunEvent) -> RoundKey:
    return (event["stage"], event["phase"], event["server_round"])


def reason_in(event: RunEvent) -> str:
    """Return the reason that an event gives on one line, without the name of the error."""
    first = plain_reason(event.get("reason", event.get("code", "")))
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
        return self.results.tasks if self.results else list(self.log.start["tasks"])

    @property
    def stages(self) -> list[list[str]]:
        """Tasks worked on in each stage, those to come included."""
        if self.results:
            return [list(stage.work) for stage in self.results.stages]
        return self.log.stages

    @property
    def matrix(self) -> Rows:
        """Task-IL accuracy after each stage that was evaluated, on each task; None: not known."""
        return self.results.accuracy_matrix if self.results else self._evaluated("accuracy")

    @property
    def class_il(self) -> Rows:
        """The same in Class-IL; empty: not known."""
        if self.results:
            found = self.results.class_incremental
            return found.accuracy_matrix if found else []
        rows = self._evaluated("class_incremental")
        return rows if any(value is not None for row in rows for value in row) else []

    def _evaluated(self, protocol: str) -> Rows:
        found = {event["stage"]: event.get(protocol) or {} for event in self.log.of("evaluated")}
        stages = range(max(found, default=-1) + 1)
        return [[found.get(i, {}).get(task) for task in self.tasks] for i in stages]

    @property
    def zero_shot(self) -> list[float | None]:
        """Accuracy before any training, on each task; None: not known."""
        if self.results:
            found: Mapping[str, float] = self.results.zero_shot
        else:
            evaluated = self.log.of("evaluated")
            found = next((event["accuracy"] for event in evaluated if event["stage"] < 0), {})
        return [found.get(task) for task in self.tasks]

    @property
    def privacy(self) -> Privacy:
        """What was spent, at the end or so far."""
        if self.results:
            return self.results.privacy
        told = [event for event in self.log.events if event["event"].startswith("client_")]
        spent = {str(e["client"]): found for e in told if (found := spending_in(e)) is not None}
        return privacy_of(self.experiment, spent)


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
        log = RunLog(read_events(run.metrics))
        begun = bool(log.starts and log.rounds is not None and log.start["stages"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{run.metrics}: cannot be read ({error})") from None
    if not begun:
        raise UserError(f"{folder}: the run has not begun, there is nothing to report")
    state: State = "finished" if results else "running" if held(run.writing) else "stopped"
    return RunRecord(folder, experiment, log, results, state)
