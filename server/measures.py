"""What has been measured in a run, and what it comes to: accuracy, privacy, bytes, time, memory."""

import resource
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import psutil

from deal_core import metrics
from deal_core.config.experiment import Experiment
from deal_core.installed import ROOT
from deal_core.privacy.distributed_noise import whom_to_trust
from deal_core.privacy.events import GROUP
from deal_core.protection import make_mechanism
from server.plan import Plan
from server.results import (
    Accuracy,
    ClassIncremental,
    ClientResult,
    Counts,
    History,
    Privacy,
    Results,
    Spending,
    Stage,
    Wire,
)

RIGHT, EXAMPLES, RIGHT_ALL = 0, 1, 2
"""Places in the counts of a task."""
Evaluated = Mapping[str, Counts]
"""Client to its counts."""
EVERYBODY = "sum"
"""In the place of a client: the counts are those of all of them together."""


def pooled(evaluation: Evaluated, tasks: Sequence[str], right: int = RIGHT) -> dict[str, float]:
    """Return the accuracy per task, 0 to 1, over all clients' examples, of the tasks of which some
    client reported any; ``right``: which of the counts are right answers."""
    accuracy = {}
    for place, task in enumerate(tasks):
        reported = [counts[place] for counts in evaluation.values() if len(counts[place]) > right]
        if examples := sum(counts[EXAMPLES] for counts in reported):
            accuracy[task] = sum(counts[right] for counts in reported) / examples
    return accuracy


def peak_rss_bytes() -> int:
    """Return the largest resident memory of this process so far, and what the workers it has
    started hold now: their part of what processes share, where the system tells it."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            held = process.memory_full_info()
            own += getattr(held, "pss", held.rss)
    return own


def commit() -> str:
    """Return the hash of the commit of this checkout, with ``-dirty`` where files differ from it;
    empty where the code lies in none, or in another's, or there is no git."""
    if not (ROOT / ".git").exists():
        return ""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(
            [*asked, "--exclude=*"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def make_results(
    experiment: Experiment,
    plan: Plan,
    history: History,
    labels: Mapping[str, Sequence[str]] | None = None,
    names: Sequence[str] = (),
) -> Results:
    """Return every measure of a whole run, from the plan and the counts in its history; ``labels``:
    task to the names of its labels; ``names``: of clients, by number."""
    tasks, data = list(plan.tasks), experiment.data
    stages = [Stage(rounds=n, work=plan.work(i)) for i, n in enumerate(plan.stages)]
    spans = metrics.spans(tasks, [stage.work for stage in stages])
    heard = [evaluation.keys() for evaluation in history.evaluations]
    missing = [len(frozenset().union(*heard) - each) for each in heard]
    asked = [plan.evaluated(stage) for stage in range(-1, len(stages))]
    own, among_all = (_measured(history, asked, spans, right) for right in (RIGHT, RIGHT_ALL))
    return Results(
        config=experiment,
        engine=experiment.run.engine,
        seed=experiment.run.seed,
        tasks=tasks,
        measures={task: data.measure(task) for task in tasks},
        stages=stages,
        unheard=missing if any(missing) else [],
        **own,
        class_incremental=ClassIncremental(**among_all) if among_all["accuracy_matrix"] else None,
        privacy=privacy_of(experiment, history.spent),
        wire=Wire(
            bytes_up=list(history.bytes_up),
            bytes_down=list(history.bytes_down),
            evaluation_bytes_down=list(history.evaluation_bytes_down),
        ),
        aggregation_error=list(history.aggregation_error),
        seconds={"total": sum(history.seconds.values()), **history.seconds},
        peak_rss_bytes=history.peak_rss_bytes,
        versions={name: version(name) for name in ("flwr", "torch", "transformers", "peft")},
        labels={task: list(own) for task, own in (labels or {}).items()},
        names=list(names),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit(),
    )


def privacy_of(experiment: Experiment, spent: Mapping[str, Spending]) -> Privacy:
    """Return what was spent, from what each client has reported."""
    reported, unit = list(spent.values()), make_mechanism(experiment).unit
    return Privacy(
        mechanism=experiment.privacy.mechanism,
        unit=unit,
        unit_column=experiment.privacy.unit_column if unit == GROUP else "",
        assumes=whom_to_trust(experiment.privacy),
        delta=max((each.delta for each in reported), default=None),
        n_delta=max((each.n_delta for each in reported if each.n_delta is not None), default=None),
        epsilon={client: spent[client].epsilon for client in sorted(spent, key=int)},
        disjoint_tasks=any(each.disjoint_tasks for each in reported),
        void=any(each.void for each in reported),
        assumes_more=any(each.assumes_more for each in reported),
        simulation_only=any(each.simulation_only for each in reported),
        silent=max(0, clients_that_spend(experiment) - len(spent)) if spent else 0,
        metrics=experiment.privacy.metrics,
    )


def clients_that_spend(experiment: Experiment) -> int:
    """Return how many clients of a run release something that is charged: those that train."""
    federation, orders = experiment.federation, experiment.stream.orders
    clients = len(federation.sites) or federation.clients
    training = federation.participants or range(clients)
    return sum(orders.get(str(client), ("all",)) != () for client in training)


def _measured(
    history: History,
    asked: Sequence[Sequence[str]],
    spans: tuple[list[int], list[int]],
    right: int,
) -> dict[str, Any]:
    begun, learnt = spans
    tasks = asked[0]
    zero_shot, matrix = _matrix(history.evaluations, asked, right)
    start, compared = _matrix(_heard_in_all(history), asked, right)
    return {
        "accuracy_matrix": matrix,
        "zero_shot": dict(zip(tasks, zero_shot, strict=False)),
        "average_accuracy": metrics.average_accuracy(matrix) if matrix else None,
        "backward_transfer": metrics.backward_transfer(compared, learnt) if compared else None,
        "forward_transfer": metrics.forward_transfer(compared, start, begun) if compared else None,
        "forgetting": metrics.forgetting(compared, learnt) if compared else None,
        "per_client": _per_client(history, len(tasks), right),
    }


def _matrix(
    evaluations: Sequence[Evaluated], asked: Sequence[Sequence[str]], right: int
) -> tuple[list[float], list[list[Accuracy]]]:
    """Return the zero-shot row, for which all tasks are ``asked``, and the others; both empty where
    one of them is not known."""
    tasks = asked[0]
    rows = [pooled(evaluation, tasks, right) for evaluation in evaluations]
    if not rows or any(row.keys() != set(some) for row, some in zip(rows, asked, strict=False)):
        return [], []
    return list(rows[0].values()), [[row.get(task) for task in tasks] for row in rows[1:]]


def _heard_in_all(history: History) -> list[Evaluated]:
    """Return the evaluations, of clients that are in all of them: one that is slow or cut off would
    look like something learnt or forgotten. Sums over other clients cannot be compared."""
    evaluations = history.evaluations
    common = set(evaluations[0]).intersection(*evaluations) if evaluations else set()
    sums = [each[EVERYBODY] for each in evaluations if EVERYBODY in each]
    told = [{row[EXAMPLES] for row in own if row} for own in zip(*sums, strict=True)]
    if any(len(numbers) > 1 for numbers in told):
        common.discard(EVERYBODY)
    return [{client: each[client] for client in common} for each in evaluations]


def _per_client(history: History, tasks: int, right: int) -> dict[str, ClientResult]:
    unknown: Counts = [[0, 0]] * tasks
    results = {}
    heard = {client for each in history.evaluations for client in each}
    for client in sorted(heard - {EVERYBODY}, key=int):
        start, *matrix = [
            [_share(counts, right) for counts in row.get(client, unknown)]
            for row in history.evaluations
        ]
        known = [value for value in matrix[-1] if value is not None]
        results[client] = ClientResult(
            accuracy_matrix=matrix,
            zero_shot=start,
            average_accuracy=sum(known) / len(known) if known else None,
            test_examples=_examples([e[client] for e in history.evaluations if client in e]),
        )
    return results


def _examples(reported: Sequence[Counts]) -> list[int | float]:
    """How many a client has of each task, as it last said where it was asked about the task."""
    return [
        next((counts[EXAMPLES] for counts in reversed(own) if counts), 0)
        for own in zip(*reported, strict=True)
    ]


def _share(counts: Sequence[int | float], right: int) -> Accuracy:
    known = len(counts) > right and counts[EXAMPLES]
    return counts[right] / counts[EXAMPLES] if known else None
