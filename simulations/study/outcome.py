"""What one cell of a study found: the measures of one run, or of several together; and bounds: one
experiment rewritten into ordinary ones, and what these say together.

Bounds train by plain cross-entropy (``sequential``), with the rounds, clients and optimiser of the
experiment. The fourth bound, zero-shot, is in the results of every run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, Literal

from deal_core import metrics
from deal_core.config.data import StreamConfig
from deal_core.config.experiment import Experiment
from deal_core.config.method import MethodConfig
from deal_core.errors import UserError
from server.plan import make_plan
from server.results import ClientResult, Results, Strict


class CountsKept(UserError):
    """A run has finished, and nobody has told how many answers were right."""


class AmongAll(Strict):
    """The measures of the same name among all labels seen so far; None as well where a file is
    from before they were kept."""

    accuracy_matrix: list[list[float]]
    average_accuracy: float
    backward_transfer: float | None
    forward_transfer: float | None = None
    forgetting: float | None
    worst_client: float | None = None


class Outcome(Strict):
    """Accuracies are 0 to 1.

    Attributes:
        accuracy_matrix: as in a run's results. One row for several tasks where no task came
            after another; then there is no transfer and no forgetting (None).
        begun, learnt: of each task, the row of its first and of its last learner
            (:mod:`deal_core.metrics`).
        learning_accuracy: on every task just after it was learnt, mean.
        worst_client: smallest of the clients' own average accuracies; None: no client has tests,
            or their counts are known as a sum alone.
        class_incremental: among all labels seen so far; None where no model has seen those of all
            tasks, or that was not counted.
        on_all_tests: of models that know one client each, on everybody's tests (local-only).
        seconds, bytes_up, bytes_down: of the whole cell; bytes are of a client in every round.
        peak_rss_bytes: largest of the cell's processes.
    """

    tasks: list[str]
    accuracy_matrix: list[list[float]]
    begun: list[int]
    learnt: list[int]
    zero_shot: dict[str, float]
    average_accuracy: float
    learning_accuracy: float
    backward_transfer: float | None
    forward_transfer: float | None
    forgetting: float | None
    worst_client: float | None
    class_incremental: AmongAll | None = None
    on_all_tests: float | None = None
    seconds: float
    peak_rss_bytes: int
    bytes_up: float
    bytes_down: float

    @property
    def among_all_labels(self) -> float | None:
        """Average accuracy among all labels seen so far."""
        found = self.class_incremental
        return None if found is None else found.average_accuracy


def outcome(results: Results) -> Outcome:
    """Return what an ordinary run has measured.

    Raises:
        UserError: its clients kept their counts.
    """
    _require_counts([results])
    own = {name: client.average_accuracy for name, client in results.per_client.items()}
    measured = _measured(
        [results], results.tasks, results.accuracy_matrix, results.zero_shot, list(own.values())
    )
    found = results.class_incremental
    if found is None:
        return measured
    return _with(measured, found.accuracy_matrix, list(found.per_client.values()))


def together(parts: Sequence[Results]) -> Outcome:
    """Return the outcome of a federation for each task alone: the accuracies side by side.

    Raises:
        UserError: the clients of one kept their counts.
    """
    _require_counts(parts)
    row = [part.accuracy_matrix[-1][0] for part in parts]
    own: dict[str, list[float]] = {}
    for part in parts:
        for name, client in part.per_client.items():
            if client.average_accuracy is not None:
                own.setdefault(name, []).append(client.average_accuracy)
    return _measured(
        parts,
        [part.tasks[0] for part in parts],
        [row],
        {task: value for part in parts for task, value in part.zero_shot.items()},
        [fmean(values) for values in own.values()],
    )


def pooled_own(parts: Sequence[Results]) -> Outcome:
    """Return the outcome of clients that are each alone: every client's model on its own tests,
    each test example counted once; part ``k`` is the run in which client ``k`` trained.

    Raises:
        UserError: the counts of a client did not arrive.
    """
    _require_counts(parts)
    mine = _own(parts)
    tasks = parts[0].tasks
    matrix = _pooled_matrix(parts, mine)
    own = [client.average_accuracy for client in mine]
    measured = _measured(parts, tasks, matrix, parts[0].zero_shot, own)
    everywhere = fmean(p.average_accuracy for p in parts if p.average_accuracy is not None)
    means = {key: getattr(measured, key) / len(parts) for key in ("bytes_up", "bytes_down")}
    found = [part.class_incremental for part in parts]
    among_all = [each.per_client[str(k)] for k, each in enumerate(found) if each is not None]
    known = len(among_all) == len(parts)
    whole = _with(measured, _pooled_matrix(parts, among_all), among_all) if known else measured
    return whole.model_copy(update={"on_all_tests": everywhere, **means})


def _with(
    measured: Outcome, among_all: list[list[float]], clients: Sequence[ClientResult]
) -> Outcome:
    """Return the outcome with the measures of a second matrix. Before anything is learnt the labels
    seen so far are a task's own, so that both begin with the same."""
    rows, start = len(among_all) > 1, [measured.zero_shot[task] for task in measured.tasks]
    begun, learnt = measured.begun, measured.learnt
    found = AmongAll(
        accuracy_matrix=among_all,
        average_accuracy=metrics.average_accuracy(among_all),
        backward_transfer=metrics.backward_transfer(among_all, learnt) if rows else None,
        forward_transfer=metrics.forward_transfer(among_all, start, begun) if rows else None,
        forgetting=metrics.forgetting(among_all, learnt) if rows else None,
        worst_client=_worst([client.average_accuracy for client in clients]),
    )
    return measured.model_copy(update={"class_incremental": found})


def _own(parts: Sequence[Results]) -> list[ClientResult]:
    """Return of each part the client that trained, which was heard at the end."""
    for k, part in enumerate(parts):
        own = part.per_client.get(str(k))
        if own is None or (own.average_accuracy is None and any(own.test_examples)):
            raise _missing(parts, k)
    return [part.per_client[str(k)] for k, part in enumerate(parts)]


def _missing(parts: Sequence[Results], client: int) -> UserError:
    return UserError(
        f"{parts[client].config.run.out}: has no counts of client {client} by itself, which is "
        "judged on its own tests; remove that folder to run it again"
    )


def _pooled_matrix(parts: Sequence[Results], clients: Sequence[ClientResult]) -> list[list[float]]:
    rows, tasks = len(clients[0].accuracy_matrix), len(clients[0].test_examples)
    return [[_pooled(parts, clients, i, j) for j in range(tasks)] for i in range(rows)]


def _pooled(
    parts: Sequence[Results], clients: Sequence[ClientResult], row: int, task: int
) -> float:
    """Over the tests of those whose counts arrived."""
    values = [(c.accuracy_matrix[row][task], c.test_examples[task]) for c in clients]
    known = [(accuracy, count) for accuracy, count in values if accuracy is not None]
    if not known:
        raise _missing(parts, next(k for k, (_, count) in enumerate(values) if count))
    return fmean([accuracy for accuracy, _ in known], [count for _, count in known])


def _require_counts(parts: Sequence[Results]) -> None:
    for part in parts:
        if not part.accuracy_matrix:
            raise CountsKept(
                f"{part.config.run.out}: its clients kept their counts, so there is no accuracy to "
                "compare; change what they are allowed to tell, and remove that folder"
            )


def _worst(own: Sequence[float | None]) -> float | None:
    return min((accuracy for accuracy in own if accuracy is not None), default=None)


def _stages(parts: Sequence[Results]) -> list[list[str]]:
    """Return the tasks that somebody has worked on in each stage, in whichever part."""
    return [
        list(dict.fromkeys(task for part in parts for task in part.stages[i].work))
        for i in range(len(parts[0].stages))
    ]


def _measured(
    parts: Sequence[Results],
    tasks: list[str],
    matrix: list[list[float]],
    zero_shot: dict[str, float],
    own: Sequence[float | None],
) -> Outcome:
    rows = len(matrix) > 1
    stages = _stages(parts) if rows else [tasks]
    begun, learnt = metrics.spans(tasks, stages)
    start = [zero_shot[task] for task in tasks]
    return Outcome(
        tasks=tasks,
        accuracy_matrix=matrix,
        begun=begun,
        learnt=learnt,
        zero_shot=zero_shot,
        average_accuracy=metrics.average_accuracy(matrix),
        learning_accuracy=metrics.learning_accuracy(matrix, learnt),
        backward_transfer=metrics.backward_transfer(matrix, learnt) if rows else None,
        forward_transfer=metrics.forward_transfer(matrix, start, begun) if rows else None,
        forgetting=metrics.forgetting(matrix, learnt) if rows else None,
        worst_client=_worst(own),
        seconds=sum(part.seconds.get("total", 0.0) for part in parts),
        peak_rss_bytes=max(part.peak_rss_bytes for part in parts),
        bytes_up=sum(sum(part.wire.bytes_up) for part in parts),
        bytes_down=sum(part.wire.received for part in parts),
    )


Parts = dict[str, Experiment]
"""Name of a part to its experiment."""


@dataclass(frozen=True)
class Bound:
    """How a bound is measured.

    Attributes:
        parts: an experiment, and the tasks of its stream, to ordinary experiments.
        combine: the results of the parts, in their order, to one outcome.
        ordered: whether the order of the tasks changes it.
    """

    parts: Callable[[Experiment, Sequence[str]], Parts]
    combine: Callable[[Sequence[Results]], Outcome]
    ordered: bool


def _joint(
    experiment: Experiment,
    tasks: Sequence[str],
    schedule: Literal["joint", "joint-all-labels"] = "joint",
) -> Parts:
    """All tasks at once: what there is to learn if nothing can be forgotten."""
    stream = StreamConfig(schedule=schedule)
    return {"": _plain(experiment).model_copy(update={"stream": stream})}


def _per_task(experiment: Experiment, tasks: Sequence[str]) -> Parts:
    """A federation, and a model, for each task alone; who does not meet it does not train."""
    everybody = [str(k) for k in range(experiment.federation.clients)]
    plan = make_plan(experiment, tasks, everybody)
    own_orders = experiment.stream.schedule == "per-client"

    def alone(task: str) -> Experiment:
        met = {name: tuple(t for t in order if t == task) for name, order in plan.orders.items()}
        orders = met if own_orders else {}
        one = _changed(_plain(experiment), "data", tasks=(task,))
        one = _changed(one, "stream", orders=orders, joins={})
        if own_orders or all(met.values()):
            return one
        chosen = experiment.federation.participants or range(len(everybody))
        trainers = tuple(k for k in chosen if met[str(k)])
        if not trainers:  # nobody trains; without a name, everybody would
            return _changed(one, "stream", schedule="per-client", orders=met)
        return _changed(one, "federation", participants=trainers)

    return {task: alone(task) for task in tasks}


def _local_only(experiment: Experiment, tasks: Sequence[str]) -> Parts:
    """Return each client alone through the stream: what it has without the others, and without a
    robust step, which has nobody to compare it with."""
    plain = _changed(_plain(experiment), "aggregation", robust="none")
    alone = range(experiment.federation.clients)
    return {f"client-{k}": _changed(plain, "federation", participants=(k,)) for k in alone}


def _plain(experiment: Experiment) -> Experiment:
    return experiment.model_copy(update={"method": MethodConfig(name="sequential")})


def _changed(experiment: Experiment, table: str, **keys: Any) -> Experiment:
    changed = getattr(experiment, table).model_copy(update=keys)
    return experiment.model_copy(update={table: changed})


BOUNDS: Mapping[str, Bound] = {
    "joint": Bound(_joint, lambda results: outcome(results[0]), ordered=False),
    "joint-all-labels": Bound(
        partial(_joint, schedule="joint-all-labels"),
        lambda results: outcome(results[0]),
        ordered=False,
    ),
    "per-task": Bound(_per_task, together, ordered=False),
    "local-only": Bound(_local_only, pooled_own, ordered=True),
}
"""``bound`` of a study's arm to how it is measured."""
