"""Where a run is: events in, a frozen state out. Nothing here knows a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from deal_core.metrics import in_turn, spans

RunEvent = Mapping[str, Any]

PHASES: Mapping[str, str] = {"learn": "training"}
"""A round's phase in words; that of another method is its own word."""


@dataclass(frozen=True)
class Stage:
    """Rounds of a stage, and the tasks worked on in it."""

    rounds: int
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Progress:
    """What is known of a run after some of its events.

    Attributes:
        phase: what happens now, in words.
        tasks: of the stream, in its order.
        stages: rounds of each stage, and the tasks worked on in it.
        stage: the one that runs, from 0; -1: none yet.
        evaluated: stages finished and evaluated.
        done, done_here: rounds finished, in all and since this start (they differ on resume).
        asked, answered: clients of the current round.
        client: the last one that answered.
        failures: client and reason, in the current round or evaluation.
        accuracy: task to accuracy (0 to 1) at the last evaluation.
        among_all: the same among all labels seen so far; empty: not known.
        zero_shot: mean over tasks before anything was learnt.
        resumed: this start continues another.
        step_ended: time of the end of the last round or evaluation.
        training: a round is at work.
        rounds_took, evaluations_took: seconds of all rounds, and of all evaluations beside them,
            of this start.
        evaluations_here: of this start, those that rounds have carried along included.
        epsilon: largest over clients, of all that their ledgers hold; None: no guarantee.
        delta: largest over clients. unit: what is protected. unit_column: that makes groups.
        disjoint_tasks: some epsilon is of a record that is in one task.
        simulation_only: some noise came from a seed.
        void: some client has released something of training records without protection.
        assumes: whom an epsilon takes to be honest. assumes_more: some counts on others, too.
    """

    phase: str = "starting"
    tasks: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = ()
    stage: int = -1
    evaluated: int = 0
    server_round: int = 0
    done: int = 0
    done_here: int = 0
    asked: int = 0
    answered: int = 0
    client: str = ""
    loss: float | None = None
    failures: tuple[tuple[str, str], ...] = ()
    accuracy: Mapping[str, float] = field(default_factory=dict)
    among_all: Mapping[str, float] = field(default_factory=dict)
    zero_shot: float | None = None
    aggregation_error: float | None = None
    round_seconds: float = 0.0
    resumed: bool = False
    step_ended: float = 0.0
    training: bool = False
    rounds_took: float = 0.0
    evaluations_took: float = 0.0
    evaluations_here: int = 0
    epsilon: float | None = None
    delta: float = 0.0
    unit: str = ""
    unit_column: str = ""
    disjoint_tasks: bool = False
    simulation_only: bool = False
    void: bool = False
    assumes: str = ""
    assumes_more: bool = False

    @property
    def total(self) -> int:
        """Rounds of the whole run."""
        return sum(stage.rounds for stage in self.stages)

    @property
    def rounds(self) -> int:
        """Rounds of the stage that runs; 0 before the first."""
        return self.stages[self.stage].rounds if self.stage >= 0 else 0

    @property
    def place(self) -> str:
        """The stage that runs, in words; empty before the first."""
        if self.stage < 0:
            return ""
        kind = "task" if in_turn(self.tasks, self._worked) else "stage"
        tasks = ", ".join(self._worked[self.stage])
        return f"{kind} {self.stage + 1}/{len(self.stages)} {tasks}"

    @property
    def learnt(self) -> list[str]:
        """Tasks whose last learner has finished them, and that were evaluated since."""
        _, ends = spans(self.tasks, self._worked)
        return [task for task, end in zip(self.tasks, ends, strict=True) if end < self.evaluated]

    @property
    def accuracy_so_far(self) -> float | None:
        """Mean over the tasks learnt, at the last evaluation; None before there is one."""
        return self._mean_learnt(self.accuracy)

    @property
    def among_all_so_far(self) -> float | None:
        """The same among all labels seen so far; None where that is not known."""
        return self._mean_learnt(self.among_all)

    def _mean_learnt(self, accuracy: Mapping[str, float]) -> float | None:
        known = [accuracy[name] for name in self.learnt if name in accuracy]
        return sum(known) / len(known) if known else None

    @property
    def _worked(self) -> list[tuple[str, ...]]:
        return [stage.tasks for stage in self.stages]

    def seconds_left(self, now: float) -> float | None:
        """Return an estimate from the mean round and the mean evaluation of this start, in which a
        resumed run may have had no evaluation yet; None before the first round has ended and the
        start has been evaluated."""
        if not self.done_here or (self.zero_shot is None and not self.resumed):
            return None
        rounds = self.rounds_took / self.done_here * (self.total - self.done)
        mean = self.evaluations_took / max(1, self.evaluations_here)
        evaluations = mean * (len(self.stages) - self.evaluated)
        return max(0.0, rounds + evaluations - max(0.0, now - self.step_ended))

    def update(self, event: RunEvent) -> Progress:
        """Return the state after one more event; unknown events change nothing."""
        return _HANDLERS.get(event["event"], _unknown)(self, event)


def _unknown(state: Progress, event: RunEvent) -> Progress:
    return state


def _run_started(state: Progress, event: RunEvent) -> Progress:
    done = event["done_rounds"]
    stages = tuple(Stage(stage["rounds"], tuple(stage["tasks"])) for stage in event["stages"])
    ends = accumulate(stage.rounds for stage in stages)
    return replace(
        state,
        phase="resuming" if event["resumed"] else "starting",
        tasks=tuple(event["tasks"]),
        unit=event.get("unit") or "",
        unit_column=event.get("unit_column") or "",
        assumes=event.get("assumes") or "",
        stages=stages,
        done=done,
        evaluated=sum(end <= done for end in ends),
        resumed=event["resumed"],
        step_ended=event["time"],
    )


def _evaluated(state: Progress, event: RunEvent) -> Progress:
    accuracy, state = dict(event["accuracy"]), _timed(state, event)
    if event["stage"] < 0:
        mean = sum(accuracy.values()) / len(accuracy) if accuracy else None
        return replace(state, accuracy=accuracy, zero_shot=mean)
    among_all = dict(event.get("class_incremental") or {})
    return replace(state, accuracy=accuracy, among_all=among_all, evaluated=event["stage"] + 1)


def _timed(state: Progress, event: RunEvent) -> Progress:
    """Return the state with the time of an evaluation; one that a round carries along is in the
    round's."""
    state = replace(state, evaluations_here=state.evaluations_here + 1)
    if state.training:
        return state
    took = state.evaluations_took + event["time"] - state.step_ended
    return replace(state, evaluations_took=took, step_ended=event["time"])


def _round_started(state: Progress, event: RunEvent) -> Progress:
    return replace(
        state,
        phase=PHASES.get(event["phase"], str(event["phase"])),
        training=True,
        stage=event["stage"],
        server_round=event["server_round"],
        asked=event["clients"],
        answered=0,
        client="",
        loss=None,
        failures=(),
    )


def _client_finished(state: Progress, event: RunEvent) -> Progress:
    answered = state.answered + 1
    mean = event.get("loss")
    if state.loss is not None and mean is not None:
        mean = (state.loss * state.answered + mean) / answered
    return _charged(
        replace(state, answered=answered, client=str(event["client"]), loss=mean), event
    )


def _charged(state: Progress, event: RunEvent) -> Progress:
    """Return what a client says that privacy has cost."""
    if "epsilon" not in event:
        return state
    spent = max(state.epsilon or 0.0, event["epsilon"])
    delta = max(state.delta, event["delta"])
    return replace(
        state,
        epsilon=spent,
        delta=delta,
        disjoint_tasks=state.disjoint_tasks or bool(event.get("disjoint_tasks")),
        simulation_only=state.simulation_only or bool(event.get("simulation_only")),
        void=state.void or bool(event.get("void")),
        assumes_more=state.assumes_more or bool(event.get("assumes_more")),
    )


def _client_failed(state: Progress, event: RunEvent) -> Progress:
    failure = (str(event["client"]), str(event["reason"]))
    return _charged(replace(state, failures=(*state.failures, failure)), event)


def _round_finished(state: Progress, event: RunEvent) -> Progress:
    return replace(
        _round_skipped(state, event),
        done_here=state.done_here + 1,
        rounds_took=state.rounds_took + event["time"] - state.step_ended,
        step_ended=event["time"],
        training=False,
        aggregation_error=event["aggregation_error"],
        round_seconds=event["seconds"],
    )


def _round_skipped(state: Progress, event: RunEvent) -> Progress:
    last = event["server_round"] == state.stages[event["stage"]].rounds
    after = "ending the stage" if last else "between rounds"
    return replace(
        state,
        phase=after if state.done else "evaluating the start",
        stage=event["stage"],
        server_round=event["server_round"],
        done=state.done + 1,
    )


def _stage_finished(state: Progress, event: RunEvent) -> Progress:
    return replace(state, phase="stage finished", evaluated=event["stage"] + 1)


def _run_finished(state: Progress, event: RunEvent) -> Progress:
    return replace(state, phase="finished")


def _run_stopped(state: Progress, event: RunEvent) -> Progress:
    return replace(state, phase="stopped")


_HANDLERS = {
    "run_started": _run_started,
    "evaluated": _evaluated,
    "round_started": _round_started,
    "client_finished": _client_finished,
    "client_failed": _client_failed,
    "round_finished": _round_finished,
    "round_skipped": _round_skipped,
    "stage_finished": _stage_finished,
    "run_finished": _run_finished,
    "run_stopped": _run_stopped,
}
