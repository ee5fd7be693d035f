"""Bounds: one experiment rewritten into ordinary ones, and what these say together.

All train by plain cross-entropy (``sequential``), with the rounds, clients and optimiser of the
experiment. The fourth bound, zero-shot, is in the results of every run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from deal_core.config.data import StreamConfig
from deal_core.config.experiment import Experiment
from deal_core.config.method import MethodConfig
from server.plan import make_plan
from server.results import Results
from simulations.study.outcome import Outcome, outcome, pooled_own, together

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
    experiment: Experiment, tasks: Sequence[str], labels: Literal["own", "all"] = "own"
) -> Parts:
    """All tasks at once: what there is to learn if nothing can be forgotten."""
    stream = StreamConfig(schedule="joint", joint_labels=labels)
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
        one = _changed(one, "stream", orders=orders, joins={}, tasks_per_client=0)
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
        partial(_joint, labels="all"), lambda results: outcome(results[0]), ordered=False
    ),
    "per-task": Bound(_per_task, together, ordered=False),
    "local-only": Bound(_local_only, pooled_own, ordered=True),
}
"""``bound`` of a study's arm to how it is measured."""
