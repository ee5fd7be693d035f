"""What the folder of a run says: its results, or what the server's own log has told so far. Runs of
a simulation and of a deployment are alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from server.folder import RunFolder, held, read_events
from server.measures import privacy_of
from server.results import Privacy, Results, read_results, spending_in
from simulations.run.run_log import RunLog
from simulations.run.simulate import RECORD, recorded
from simulations.run.summary import measured_by

Rows = Sequence[Sequence[float | None]]
State = Literal["finished", "running", "stopped"]


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
    def measured(self) -> list[str]:
        """Of each task what its figures are."""
        return measured_by(self.experiment, self.tasks)

    @property
    def stages(self) -> list[list[str]]:
        """Tasks worked on in each stage, those to come included."""
        if self.results:
            return [list(stage.work) for stage in self.results.stages]
        return [list(stage["tasks"]) for stage in self.log.start["stages"]]

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
    """Return what the folder of a run says. UserError: it cannot be read, or has not begun."""
    run = RunFolder(folder)
    results = read_results(folder) if run.results.is_file() else None
    experiment = results.config if results else recorded(folder)
    try:
        log = RunLog(read_events(run.metrics))
        begun = bool(log.of("run_started") and log.rounds is not None and log.start["stages"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{run.metrics}: cannot be read ({error})") from None
    if not begun:
        raise UserError(f"{folder}: the run has not begun, there is nothing to report")
    state: State = "finished" if results else "running" if held(run.writing) else "stopped"
    return RunRecord(folder, experiment, log, results, state)
