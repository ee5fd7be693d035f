"""What one cell of a study found: the measures of one run, or of several together; and bounds: one
experiment rewritten into ordinary ones, and what these say together.

Bounds train by plain cross-entropy (``sequential``), with the rounds, clients and optimiser of the
experiment. One more, zero-shot, is in the results of every run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from deal_core import metrics
from deal_core.config.data import StreamConfig
from deal_core.config.experiment import Experiment, MethodConfig
from deal_core.errors import UserError
from server.results import Accuracy, ClientResult, Results, Strict


class CountsKept(UserError):
    """A run has finished, and nobody has told how many answers were right."""


class Measures(Strict):
    """Of one protocol; accuracies are 0 to 1."""

    accuracy_matrix: list[list[Accuracy]]
    """As in a run's results. One row for several tasks where no task came after another; then there
    is no transfer and no forgetting (None)."""
    average_accuracy: float
    backward_transfer: float | None
    forward_transfer: float | None = None
    forgetting: float | None
    worst_client: float | None = None
    """Smallest of the clients' own average accuracies; None: no client has tests, or their counts
    are known as a sum alone. A stored study may lack it, and forward transfer, in Class-IL."""


class Outcome(Measures):
    """In Task-IL, with Class-IL beside it."""

    tasks: list[str]
    begun: list[int]
    """Of each task the row of its first learner (:mod:`deal_core.metrics`)."""
    learnt: list[int]
    """Of each task the row of its last learner."""
    zero_shot: dict[str, float]
    learning_accuracy: float
    """On every task just after it was learnt, mean."""
    class_incremental: Measures | None = None
    """None: no model has seen the labels of all tasks, or that was not counted."""
    on_all_tests: float | None = None
    """Of models that know one client each, on everybody's tests (local-only)."""
    seconds: float
    """Of the whole cell."""
    peak_rss_bytes: int
    """Largest of the cell's processes."""
    bytes_up: float
    """Of the whole cell, of a client in every round."""
    bytes_down: float


def outcome(results: Results) -> Outcome:
    """Return what an ordinary run has measured. UserError: its clients kept their counts."""
    _require_counts([results])
    among_all, class_il = results.class_incremental, None
    if among_all is not None:
        class_il = among_all.accuracy_matrix, list(among_all.per_client.values())
    task_il = results.accuracy_matrix, list(results.per_client.values())
    return _measured([results], results.tasks, results.zero_shot, task_il, class_il)


def together(parts: Sequence[Results]) -> Outcome:
    """Return the outcome of each task alone, side by side. UserError: counts are missing."""
    _require_counts(parts)
    row: list[Accuracy] = [metrics.measured(part.accuracy_matrix, -1, 0) for part in parts]
    own: dict[str, list[float]] = {}
    for part in parts:
        for name, client in part.per_client.items():
            if client.average_accuracy is not None:
                own.setdefault(name, []).append(client.average_accuracy)
    tasks = [part.tasks[0] for part in parts]
    zero_shot = {task: value for part in parts for task, value in part.zero_shot.items()}
    measured = _measured(parts, tasks, zero_shot, ([row], []))
    worst = min(map(fmean, own.values()), default=None)
    return measured.model_copy(update={"worst_client": worst})


def pooled_own(parts: Sequence[Results]) -> Outcome:
    """Return the outcome of clients that are each alone: every client's model on its own tests,
    each test example counted once; part ``k`` is the run in which client ``k`` trained.

    Raises:
        UserError: the counts of a client did not arrive.
    """
    _require_counts(parts)
    mine = [_own(part, k) for k, part in enumerate(parts)]
    found = [part.class_incremental for part in parts]
    among_all = [each.per_client[str(k)] for k, each in enumerate(found) if each is not None]
    known = len(among_all) == len(parts)
    measured = _measured(
        parts,
        parts[0].tasks,
        parts[0].zero_shot,
        (_pooled_matrix(parts, mine), mine),
        (_pooled_matrix(parts, among_all), among_all) if known else None,
    )
    everywhere = fmean(p.average_accuracy for p in parts if p.average_accuracy is not None)
    means = {key: getattr(measured, key) / len(parts) for key in ("bytes_up", "bytes_down")}
    return measured.model_copy(update={"on_all_tests": everywhere, **means})


def _own(part: Results, client: int) -> ClientResult:
    own = part.per_client.get(str(client))
    if own is None or (own.average_accuracy is None and any(own.test_examples)):
        raise _missing(part, client)
    return own


def _missing(part: Results, client: int) -> UserError:
    return UserError(
        f"{part.config.run.out}: has no counts of client {client} by itself, which is judged on "
        "its own tests; remove that folder to run it again"
    )


def _pooled_matrix(
    parts: Sequence[Results], clients: Sequence[ClientResult]
) -> list[list[Accuracy]]:
    """Return the accuracies over the tests of those whose counts arrived."""

    def pooled(row: int, task: int) -> Accuracy:
        if all(part.accuracy_matrix[row][task] is None for part in parts):
            return None
        values = [(c.accuracy_matrix[row][task], c.test_examples[task]) for c in clients]
        known = [(accuracy, count) for accuracy, count in values if accuracy is not None]
        if not known:
            client = next(k for k, (_, count) in enumerate(values) if count)
            raise _missing(parts[client], client)
        return fmean([accuracy for accuracy, _ in known], [count for _, count in known])

    rows, tasks = len(clients[0].accuracy_matrix), len(clients[0].test_examples)
    return [[pooled(i, j) for j in range(tasks)] for i in range(rows)]


def _require_counts(parts: Sequence[Results]) -> None:
    for part in parts:
        if not part.accuracy_matrix:
            raise CountsKept(
                f"{part.config.run.out}: its clients kept their counts, so there is no accuracy to "
                "compare; change what they are allowed to tell, and remove that folder"
            )


Counted = tuple[list[list[Accuracy]], Sequence[ClientResult]]
"""An accuracy matrix, and those of clients."""


def _measured(
    parts: Sequence[Results],
    tasks: list[str],
    zero_shot: dict[str, float],
    task_il: Counted,
    class_il: Counted | None = None,
) -> Outcome:
    """Return all measures. Before anything is learnt the labels seen so far are a task's own, so
    that both protocols begin with the same accuracies."""
    matrix = task_il[0]
    stages = [tasks]
    if len(matrix) > 1:  # the tasks that somebody has worked on in each stage, in whichever part
        stages = [
            list(dict.fromkeys(task for part in parts for task in part.stages[i].work))
            for i in range(len(parts[0].stages))
        ]
    begun, learnt = metrics.spans(tasks, stages)
    start = [zero_shot[task] for task in tasks]

    def measures(counted: Counted) -> dict[str, Any]:
        matrix, clients = counted
        own = (client.average_accuracy for client in clients)
        found = {
            "accuracy_matrix": matrix,
            "average_accuracy": metrics.average_accuracy(matrix),
            "worst_client": min((value for value in own if value is not None), default=None),
        }
        if len(matrix) == 1:
            return found | dict.fromkeys(("backward_transfer", "forward_transfer", "forgetting"))
        return found | {
            "backward_transfer": metrics.backward_transfer(matrix, learnt),
            "forward_transfer": metrics.forward_transfer(matrix, start, begun),
            "forgetting": metrics.forgetting(matrix, learnt),
        }

    return Outcome(
        **measures(task_il),
        tasks=tasks,
        begun=begun,
        learnt=learnt,
        zero_shot=zero_shot,
        learning_accuracy=metrics.learning_accuracy(matrix, learnt),
        class_incremental=None if class_il is None else Measures(**measures(class_il)),
        seconds=sum(part.seconds.get("total", 0.0) for part in parts),
        peak_rss_bytes=max(part.peak_rss_bytes for part in parts),
        bytes_up=sum(sum(part.wire.bytes_up) for part in parts),
        bytes_down=sum(part.wire.received for part in parts),
    )


Parts = dict[str, Experiment]
"""Name of a part to its experiment."""


@dataclass(frozen=True)
class Bound:
    """How a bound is measured."""

    parts: Callable[[Experiment, Sequence[str]], Parts]
    """An experiment, and the tasks of its stream, to ordinary experiments."""
    combine: Callable[[Sequence[Results]], Outcome] = lambda parts: outcome(parts[0])
    """The results of the parts, in their order, to one outcome."""
    ordered: bool = False
    """Whether the order of the tasks changes it."""


def _joint(schedule: Literal["joint", "joint-all-labels"]) -> Bound:
    """All tasks at once: what there is to learn if nothing can be forgotten."""
    stream = StreamConfig(schedule=schedule)
    return Bound(lambda one, tasks: {"": _plain(one).model_copy(update={"stream": stream})})


def _per_task(experiment: Experiment, tasks: Sequence[str]) -> Parts:
    """Return a federation for each task alone."""
    if experiment.stream.model_copy(update={"evaluate_every": 1}) != StreamConfig():
        raise UserError('bound = "per-task": needs the stream of all clients; leave out [stream]')
    return {task: _plain(experiment).changed(data={"tasks": (task,)}) for task in tasks}


def _local_only(experiment: Experiment, tasks: Sequence[str]) -> Parts:
    """Return each client alone through the stream, without a robust step, which has nobody to
    compare it with."""
    plain = _plain(experiment).changed(aggregation={"robust": "none"})
    alone = range(experiment.federation.clients)
    return {f"client-{k}": plain.changed(federation={"participants": (k,)}) for k in alone}


def _plain(experiment: Experiment) -> Experiment:
    return experiment.model_copy(update={"method": MethodConfig(name="sequential")})


BOUNDS: Mapping[str, Bound] = {
    "": Bound(lambda experiment, tasks: {"": experiment}, ordered=True),
    "joint": _joint("joint"),
    "joint-all-labels": _joint("joint-all-labels"),
    "per-task": Bound(_per_task, together),
    "local-only": Bound(_local_only, pooled_own, ordered=True),
}
"""``bound`` of a study's arm to how it is measured; empty: as it is."""
