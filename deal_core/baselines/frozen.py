"""Baselines that train no adapter: the base model stays as it is, and labels get heads from sums.

``prototype``: class means. ``linear-probe``: softmax regression for each task on the frozen model's
embeddings. Every client sends the second moment of its records of the task once, then the exact
gradient sum over them in every round; the server takes an accelerated step in the metric of a fixed
bound on the Hessian: (M41), (M42) of docs/method.md. However the data are divided the steps are
those of one machine. Exact sums tell who is among few records, so a site gives none: simulations
alone do. Sources: Boehning 1992 (the bound); Nesterov 1983; O'Donoghue & Candes 2015 (restart).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from deal_core.config.experiment import AdapterConfig, PrototypeConfig
from deal_core.deal import interface
from deal_core.deal.class_means import class_statistics
from deal_core.lora.adapter import zero_adapter
from deal_core.lora.payload import MOST_EXAMPLES, PayloadError
from deal_core.lora.state import State
from deal_core.wire.instruction import LEARN

MOMENT, COUNT, GRADIENT = "moment", "count", "gradient"
WEIGHTS, MOMENTUM = "weights", "momentum"
TOLERANCE = 1e-4
"""Relative error of what vectors add up to that rounding may make."""
ROUNDING = 1e-6
"""Error of a sum that has travelled in fixed point, for each example."""


@dataclass(frozen=True)
class Frozen:
    """Attributes: ``phases`` that add up statistics, one in the place of learning."""

    adapter: AdapterConfig
    phases: tuple[interface.Phase, ...]

    def begin_task(
        self, state: State, generator: torch.Generator, tasks: Sequence[str] = ()
    ) -> State:
        """Keep everything; next to nothing travels for adapters that are zero."""
        if state.current.rank == state.retained.rank == 1:
            return state
        shapes, alpha = state.current.shapes, self.adapter.lora_alpha
        return replace(
            state, current=zero_adapter(shapes, 1, alpha), retained=zero_adapter(shapes, 1)
        )

    def end_task(self, state: State, tasks: Sequence[str] = ()) -> State:
        """Keep everything as it is."""
        return state

    objective = staticmethod(interface.no_objective)  # every phase adds up statistics


def prototype(adapter: AdapterConfig, config: PrototypeConfig) -> Frozen:
    """Return ``prototype``: every client sends the sums of its records of a task once, with noise;
    the nearest class mean in the metric of public texts is the answer, (M69). Sources: Mensink et
    al. 2013 (nearest class mean); Janson et al. 2022 (in continual learning)."""
    return Frozen(adapter, (interface.Phase(LEARN, 0, statistics=class_statistics(config)),))


ROUNDS = 30
"""Of exact gradients per task (linear-probe), after the one in which the sums are taken."""
RIDGE = 3e-4
"""Weight of half the squared norm of weights and biases beside the mean cross-entropy."""


def collect_moment(task: interface.EmbeddedTask) -> interface.Tensors:
    """Return how many examples each label has, and ``sum_x [x; 1][x; 1]^T``, rows of its upper
    triangle; float64."""
    x = with_one(task.embeddings.double())
    matrix = x.T @ x
    rows, columns = torch.triu_indices(*matrix.shape)
    count = torch.bincount(task.targets, minlength=task.labels).double()
    return {COUNT: count, MOMENT: matrix[rows, columns]}


def symmetric(values: Tensor) -> Tensor:
    """Return the matrix of which the upper triangle was sent."""
    size = math.isqrt(2 * len(values))
    rows, columns = torch.triu_indices(size, size)
    matrix = torch.zeros(size, size, dtype=values.dtype)
    matrix[rows, columns] = values
    matrix[columns, rows] = values
    return matrix


def check_moment(sums: interface.Tensors) -> None:
    """Raise PayloadError unless unit vectors can have this moment."""
    n, moment = require_counts(sums[COUNT]), symmetric(sums[MOMENT])
    if max(abs(float(moment.trace()) - 2 * n), abs(float(moment[-1, -1]) - n)) > TOLERANCE * n:
        raise PayloadError("moment: not of so many unit vectors")
    if float(torch.linalg.eigvalsh(moment)[0]) < -ROUNDING * n:
        raise PayloadError("moment: a negative eigenvalue")


def require_counts(count: Tensor) -> float:
    """Return how many examples there are; PayloadError for what is no such number."""
    if bool((count < 0).any()) or bool((count != count.round()).any()):
        raise PayloadError("count: not whole numbers from 0")
    n = float(count.sum())
    if not 1 <= n <= MOST_EXAMPLES:
        raise PayloadError("count: out of bounds")
    return n


def shapes(labels: int, size: int) -> Mapping[str, tuple[int, ...]]:
    """Name to shape of what a client sends in a round of gradients."""
    return {COUNT: (1,), GRADIENT: (labels, size + 1)}


def collect(task: interface.EmbeddedTask) -> interface.Tensors:
    """Return the sum over examples of the gradient of the cross-entropy at the task's head:
    ``count`` ``(1,)``, ``gradient`` ``(labels, size + 1)``, float64."""
    x, targets = with_one(task.embeddings.double()), task.targets
    weights = torch.zeros(task.labels, x.shape[1]) if task.head is None else task.head
    error = torch.softmax(x @ weights.double().T, dim=1)
    error[torch.arange(len(targets)), targets] -= 1.0
    return {COUNT: torch.tensor([float(len(targets))]).double(), GRADIENT: error.T @ x}


def with_one(x: Tensor) -> Tensor:
    """Return the rows with a 1 behind them, which the bias is multiplied with."""
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)


def check(sums: interface.Tensors) -> None:
    """Raise PayloadError unless unit vectors can have this gradient."""
    n, gradient = require_counts(sums[COUNT]), sums[GRADIENT]
    if bool((gradient.norm(dim=1) > math.sqrt(2.0) * n * (1 + TOLERANCE)).any()):
        raise PayloadError("gradient: longer than so many unit vectors can make it")
    if float(gradient.sum(dim=0).abs().max()) > TOLERANCE * n:
        raise PayloadError("gradient: its rows do not cancel")


def absorb_moment(
    state: State, totals: Mapping[str, interface.Tensors], known: interface.SumContext
) -> State:
    """Server: keep the moments of a round; a new task starts from a head of zeros."""
    sums, heads = dict(state.sums), dict(state.heads)
    for task, total in totals.items():
        moment = symmetric(total[MOMENT])
        start = torch.zeros(len(total[COUNT]), len(moment), dtype=torch.float64)
        sums |= {f"{MOMENT}/{task}": moment, f"{WEIGHTS}/{task}": start}
        sums[f"{MOMENTUM}/{task}"] = torch.ones(1, dtype=torch.float64)
        heads[task] = start.float()
    return replace(state, sums=sums, heads=heads)


def absorb_gradient(
    state: State, totals: Mapping[str, interface.Tensors], known: interface.SumContext, ridge: float
) -> State:
    """Return the state after one step of every task that gradients have come of; at the server. The
    head is where the next gradient is taken. Without the task's moment there is no metric, and no
    step."""
    sums, heads = dict(state.sums), dict(state.heads)
    for task, total in totals.items():
        if task not in heads:
            continue
        point = heads[task].double()
        gradient = total[GRADIENT] / total[COUNT] + ridge * point
        weights, momentum = sums[f"{WEIGHTS}/{task}"], float(sums[f"{MOMENTUM}/{task}"])
        after = point - torch.linalg.solve(bound(sums[f"{MOMENT}/{task}"], ridge), gradient.T).T
        if float((gradient * (after - weights)).sum()) > 0:  # uphill: the momentum is dropped
            momentum = 1.0
        following = (1.0 + math.sqrt(1.0 + 4.0 * momentum**2)) / 2.0
        ahead = after + (momentum - 1.0) / following * (after - weights)
        sums[f"{WEIGHTS}/{task}"] = after
        sums[f"{MOMENTUM}/{task}"] = torch.tensor([following], dtype=torch.float64)
        heads[task] = ahead.float()
    return replace(state, sums=sums, heads=heads)


def bound(moment: Tensor, ridge: float) -> Tensor:
    """Return the bound on a label's block of the Hessian, ``(size + 1, size + 1)``: half the second
    moment of the embeddings with a 1 behind them, and the ridge."""
    identity = torch.eye(len(moment), dtype=moment.dtype)
    return 0.5 * moment / moment[-1, -1] + ridge * identity


@dataclass(frozen=True)
class LinearProbe(Frozen):
    """Heads of zeros that rounds of exact gradients train."""

    def end_task(self, state: State, tasks: Sequence[str] = ()) -> State:
        """The heads are what was reached, not where the next gradient would be taken."""
        heads = {task: state.sums[f"{WEIGHTS}/{task}"].float() for task in state.heads}
        return replace(state, heads=heads)


def linear_probe(adapter: AdapterConfig, rounds: int = ROUNDS, ridge: float = RIDGE) -> LinearProbe:
    """Return the method with so many rounds of exact gradients a task."""
    once = interface.ExactSums(
        lambda labels, size: {COUNT: (labels,), MOMENT: ((size + 1) * (size + 2) // 2,)},
        collect_moment,  # of a symmetric moment the upper triangle
        check_moment,
    )
    first = interface.Statistics(absorb_moment, True, exact=once)
    absorb = partial(absorb_gradient, ridge=ridge)
    further = interface.Statistics(absorb, False, exact=interface.ExactSums(shapes, collect, check))
    learn = interface.Phase(LEARN, 0, statistics=first)
    probe = interface.Phase("probe", rounds, statistics=further)
    return LinearProbe(adapter, (learn, probe))
