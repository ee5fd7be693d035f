"""What the folders of runs say: of one its results, or what the server's own log has told so far,
alike in a simulation and in a deployment; of several their figures side by side."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from deal_core.config.experiment import Experiment
from deal_core.config.file import WHERE, leaves
from deal_core.errors import UserError, at_home
from server.folder import RunFolder, held, read_events
from server.results import Privacy, Results, read_results, spending_in
from simulations.output import DASH, Table, percent, print_line, print_table, signed
from simulations.report.blocks import at_most, time
from simulations.run.run_log import RunLog
from simulations.run.simulate import RECORD, recorded, rows_of
from simulations.run.summary import measured_by

Rows = Sequence[Sequence[float | None]]
State = Literal["finished", "running", "stopped"]
HIDDEN = {*WHERE, "data.path", "data.files"}
"""Where files lie and how many threads there are: of the machine, and of no use elsewhere."""
COLUMNS = ("run", "Task-IL", "Class-IL", "backward", "forgot", "worst", "epsilon", "time")
"""Of runs side by side."""


@dataclass(frozen=True)
class RunRecord:
    """What the folder of a run says; of one that has not finished, as far as its log tells."""

    folder: Path
    experiment: Experiment
    log: RunLog
    results: Results | None
    """None: the run has not finished."""
    state: State
    tasks: list[str]
    """In the stream's order."""
    stages: list[list[str]]
    """Tasks worked on in each stage, those to come included."""
    matrix: Rows
    """Task-IL accuracy after each stage that was evaluated, on each task; None: not known."""
    class_il: Rows
    """The same in Class-IL; empty: not known."""
    zero_shot: list[float | None]
    """Accuracy before any training, on each task; None: not known."""
    privacy: Privacy
    """What was spent, at the end or so far."""

    @property
    def measured(self) -> list[str]:
        """Of each task what its figures are."""
        return measured_by(self.experiment, self.tasks)


def read_run(folder: Path) -> RunRecord:
    """Return what the folder of a run says. UserError: it is none, or the run has not begun."""
    run = RunFolder(folder)
    if not any(path.is_file() for path in (run.results, run.metrics, folder / RECORD)):
        raise UserError(f"{folder}: no run, study or audit here; name the folder that --out named")
    results = read_results(folder) if run.results.is_file() else None
    experiment = results.config if results else recorded(folder)
    try:
        log = RunLog(read_events(run.metrics))
        begun = bool(log.of("run_started") and log.rounds is not None and log.start["stages"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{run.metrics}: cannot be read ({error})") from None
    if not begun:
        raise UserError(f"{folder}: the run has not begun, there is nothing to report")
    if results:
        among_all = results.class_incremental
        return RunRecord(
            folder=folder,
            experiment=experiment,
            log=log,
            results=results,
            state="finished",
            tasks=results.tasks,
            stages=[list(stage.work) for stage in results.stages],
            matrix=results.accuracy_matrix,
            class_il=among_all.accuracy_matrix if among_all else [],
            zero_shot=[results.zero_shot.get(task) for task in results.tasks],
            privacy=results.privacy,
        )
    from server.measures import privacy_of  # with torch; a finished run has its figures

    tasks = list(log.start["tasks"])
    evaluated = {event["stage"]: event for event in log.of("evaluated")}

    def row(stage: int, protocol: str) -> list[float | None]:
        found = evaluated.get(stage, {}).get(protocol) or {}
        return [found.get(task) for task in tasks]

    done = range(max(evaluated, default=-1) + 1)
    class_il = [row(stage, "class_incremental") for stage in done]
    told = [event for event in log.events if event["event"].startswith("client_")]
    spent = {str(e["client"]): found for e in told if (found := spending_in(e)) is not None}
    return RunRecord(
        folder=folder,
        experiment=experiment,
        log=log,
        results=None,
        state="running" if held(run.writing) else "stopped",
        tasks=tasks,
        stages=[list(stage["tasks"]) for stage in log.start["stages"]],
        matrix=[row(stage, "accuracy") for stage in done],
        class_il=class_il if any(value is not None for each in class_il for value in each) else [],
        zero_shot=row(-1, "accuracy"),
        privacy=privacy_of(experiment, spent),
    )


def settings_text(experiment: Experiment) -> dict[str, str]:
    """Return every setting by its key, as it stands in a file, without those of the machine."""
    return {
        key: value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
        for key, value in leaves(experiment).items()
        if key not in HIDDEN
    }


def compare(folders: Sequence[str], console: Console) -> None:
    """Print measures of the runs in the folders in at most 80 columns, what their epsilons mean,
    why figures may not be comparable, and the settings that differ.

    Raises:
        UserError: fewer than two runs, one twice, or one that has not finished.
    """
    paths = [at_home(folder).resolve() for folder in folders]
    if len(set(paths)) < max(2, len(paths)):
        raise UserError("deal compare: name two runs at least, and each once")
    above = os.path.commonpath(paths)
    runs = {str(path.relative_to(above)): read_results(path) for path in paths}
    for warning in _incomparable(list(runs.values()), [rows_of([path]) for path in paths]):
        print_line(console, f"warning: {warning}")
    rows, meanings = [], list[str]()
    for name, found in runs.items():
        among_all, worst, privacy = found.class_incremental, found.worst_client, found.privacy
        spent = DASH
        if privacy.epsilon and privacy.delta is not None and privacy.unit is not None:
            meanings += [] if privacy.meaning in meanings else [privacy.meaning]
            largest = at_most(max(privacy.epsilon.values()))
            spent = f"{largest} [{meanings.index(privacy.meaning) + 1}]"
        figures = (
            percent(found.average_accuracy),
            percent(among_all.average_accuracy if among_all else None),
            signed(found.backward_transfer),
            percent(found.forgetting),
            percent(worst[1] if worst else None),
            spent,
            time(found.seconds.get("total")),
        )
        rows.append((name, *figures))
    title = "Accuracies in %, backward transfer and forgetting in points"
    print_table(console, Table(title, COLUMNS, tuple(rows)))
    for number, meaning in enumerate(meanings, start=1):
        print_line(console, f"[{number}] epsilon {meaning}")
    settings = [settings_text(found.config) for found in runs.values()]
    values = {key: [own[key] for own in settings] for key in settings[0]}
    differing = tuple((key, *own) for key, own in values.items() if len(set(own)) > 1)
    if differing:
        print_table(console, Table("Settings that differ", ("key", *runs), differing))
    print_line(console, "One run each: differences of a point or two may be chance (deal study).")


def _incomparable(runs: Sequence[Results], rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """Yield why figures of runs, which had these rows, may not be comparable."""
    orders = {tuple(found.tasks) for found in runs}
    if len(set(map(frozenset, orders))) > 1:
        yield "The runs have different tasks: their accuracies are of other questions."
    elif len(orders) > 1:
        yield "The runs have the same tasks in different orders."
    if len({found.config.model.name for found in runs}) > 1:
        yield "The runs have different base models."
    for task in rows[0]:
        if len({each[task] for each in rows if task in each}) > 1:
            yield (
                f"Task '{task}' has other rows in one run than in another, by other files or "
                "settings of data: part of a difference in its accuracy may be theirs."
            )
