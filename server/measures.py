"""What a run has come to: accuracy, privacy, bytes, time, memory."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import psutil

from deal_core import metrics
from deal_core.config.experiment import Experiment
from deal_core.privacy.distributed_noise import whom_to_trust
from deal_core.privacy.events import GROUP
from deal_core.protection import make_mechanism
from server.checkpoint import EVERYBODY, History, commit
from server.plan import Plan
from server.results import (
    Accuracy,
    ClassIncremental,
    ClientResult,
    Privacy,
    Results,
    Spending,
    Stage,
    Wire,
)


def peak_rss_bytes() -> int:
    """Return the largest resident memory of this process so far, and what the workers it has
    started hold now: their part of what processes share, where the system tells it."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    workers = 0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            held = process.memory_full_info()
            workers += getattr(held, "pss", held.rss)
    return own + workers


RIGHT, EXAMPLES, RIGHT_ALL = 0, 1, 2
"""Places in the counts of a task (:class:`~server.checkpoint.History`)."""

Evaluated = Mapping[str, list[list[int | float]]]
"""Client to its counts of each task."""


def make_results(
    experiment: Experiment,
    plan: Plan,
    history: History,
    labels: Mapping[str, Sequence[str]] | None = None,
) -> Results:
    """Return every measure, from the plan and the counts in the history.

    Args:
        experiment: of the run.
        plan: who worked on what.
        history: of the whole run.
        labels: task to the names of its labels; None: not known.

    Returns:
        The results, as they are written.
    """
    tasks, data = list(plan.tasks), experiment.data
    stages = [Stage(rounds=n, work=plan.work(i)) for i, n in enumerate(plan.stages)]
    begun, learnt = metrics.spans(tasks, [stage.work for stage in stages])
    own, among_all = (_measured(history, tasks, begun, learnt, n) for n in (RIGHT, RIGHT_ALL))
    return Results(
        config=experiment,
        engine=experiment.run.engine,
        seed=experiment.run.seed,
        tasks=tasks,
        measures={
            task: data.measure(task) if task in data.generation else "accuracy" for task in tasks
        },
        stages=stages,
        unheard=_unheard(history),
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
        labels={task: list(names) for task, names in (labels or {}).items()},
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit(),
    )


def privacy_of(experiment: Experiment, spent: Mapping[str, Spending]) -> Privacy:
    """Return what was spent, from what each client has told."""
    mechanism = make_mechanism(experiment)
    return Privacy(
        mechanism=experiment.privacy.mechanism,
        unit=mechanism.unit,
        unit_column=experiment.privacy.unit_column if mechanism.unit == GROUP else "",
        assumes=whom_to_trust(experiment.privacy),
        delta=max((each.delta for each in spent.values()), default=None),
        n_delta=max((s.n_delta for s in spent.values() if s.n_delta is not None), default=None),
        epsilon={client: spent[client].epsilon for client in sorted(spent, key=int)},
        disjoint_tasks=any(each.disjoint_tasks for each in spent.values()),
        void=any(each.void for each in spent.values()),
        assumes_more=any(each.assumes_more for each in spent.values()),
        silent=max(0, clients_that_spend(experiment) - len(spent)) if spent else 0,
        simulation_only=any(each.simulation_only for each in spent.values()),
        metrics=experiment.privacy.metrics,
    )


def clients_that_spend(experiment: Experiment) -> int:
    """Return how many clients of a run release something that is charged: those that train, and,
    where counts of right answers have noise, all."""
    if experiment.privacy.metrics == "noised":
        return len(experiment.federation.sites) or experiment.federation.clients
    return clients_that_train(experiment)


def clients_that_train(experiment: Experiment) -> int:
    """Return how many of a run there are: the others only evaluate."""
    federation, orders = experiment.federation, experiment.stream.orders
    clients = len(federation.sites) or federation.clients
    training = federation.participants or range(clients)
    return sum(orders.get(str(client), ("all",)) != () for client in training)


def _measured(
    history: History, tasks: list[str], begun: list[int], learnt: list[int], right: int
) -> dict[str, Any]:
    """The measures of one protocol, by field; ``right``: which of the counts are right answers."""
    zero_shot, matrix = _matrix(history.evaluations, len(tasks), right)
    start, compared = _matrix(_heard_in_all(history), len(tasks), right)
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
    evaluations: Sequence[Evaluated], tasks: int, right: int
) -> tuple[list[float], list[list[float]]]:
    """The zero-shot row and the others; both empty where one of them is not known."""
    rows = [_accuracies(evaluation, tasks, right) for evaluation in evaluations]
    known = [row for row in rows if row is not None]
    return (known[0], known[1:]) if len(known) == len(rows) else ([], [])


def _unheard(history: History) -> list[int]:
    """Of each evaluation, how many clients are missing that are in another; empty: none."""
    heard = [evaluation.keys() for evaluation in history.evaluations]
    everybody = frozenset().union(*heard)
    missing = [len(everybody - each) for each in heard]
    return missing if any(missing) else []


def _heard_in_all(history: History) -> list[Evaluated]:
    """Return the evaluations, of clients that are in all of them: one that is slow or cut off would
    look like something learnt or forgotten. Sums over other clients cannot be compared."""
    evaluations = history.evaluations
    common = set(evaluations[0]).intersection(*evaluations) if evaluations else set()
    sums = [[row[EXAMPLES] for row in each[EVERYBODY]] for each in evaluations if EVERYBODY in each]
    if any(each != sums[0] for each in sums):
        common.discard(EVERYBODY)
    return [{client: each[client] for client in common} for each in evaluations]


def _accuracies(evaluation: Evaluated, tasks: int, right: int) -> list[float] | None:
    """Pooled over clients: every test example counts once. None: of some task nobody told any."""
    row = []
    for j in range(tasks):
        told = [counts[j] for counts in evaluation.values() if len(counts[j]) > right]
        examples = sum(counts[EXAMPLES] for counts in told)
        if not examples:
            return None
        row.append(sum(counts[right] for counts in told) / examples)
    return row


def _per_client(history: History, tasks: int, right: int) -> dict[str, ClientResult]:
    unknown = [[0, 0]] * tasks
    results = {}
    latest = {client: counts for each in history.evaluations for client, counts in each.items()}
    for client in sorted(latest.keys() - {EVERYBODY}, key=int):
        matrix = [
            [_share(counts, right) for counts in row.get(client, unknown)]
            for row in history.evaluations[1:]
        ]
        known = [value for value in matrix[-1] if value is not None]
        start = history.evaluations[0].get(client, unknown)
        results[client] = ClientResult(
            accuracy_matrix=matrix,
            zero_shot=[_share(counts, right) for counts in start],
            average_accuracy=sum(known) / len(known) if known else None,
            test_examples=[counts[EXAMPLES] for counts in latest[client]],
        )
    return results


def _share(counts: Sequence[int | float], right: int) -> Accuracy:
    known = len(counts) > right and counts[EXAMPLES]
    return counts[right] / counts[EXAMPLES] if known else None
