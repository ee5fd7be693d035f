"""Embedded tasks, divided over clients, and rounds of sums over them."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from deal_core.config.experiment import Experiment, MethodConfig
from deal_core.deal.class_means import COUNT, SUM
from deal_core.deal.interface import EmbeddedTask, Statistics, SumContext
from deal_core.lora.adapter import zero_adapter
from deal_core.lora.state import State
from deal_core.methods import method_of
from deal_core.randomness import seeded
from deal_core.training.public_subspace import Subspace, principal

SIZE, LABELS = 12, 4
Data = tuple[Tensor, Tensor]


def data(seed: int, examples: int = 160) -> Data:
    """Unit vectors around a mean of each label, with noise that has a direction."""
    generator = seeded("statistics", seed)
    means = torch.randn(LABELS, SIZE, generator=generator)
    targets = torch.randint(LABELS, (examples,), generator=generator)
    stretch = torch.linspace(0.2, 2.0, SIZE)
    x = means[targets] + stretch * torch.randn(examples, SIZE, generator=generator)
    return normalize(x, dim=1), targets


def divided(x: Tensor, y: Tensor, how: str) -> list[Data]:
    """The same records at other clients."""
    if how == "one client":
        places = torch.zeros(len(x), dtype=torch.long)
    elif how == "a label each":
        places = y
    elif how == "one record and the rest":
        places = (torch.arange(len(x)) > 0).long()
    else:
        places = torch.randint(5, (len(x),), generator=seeded("divided"))
    return [(x[places == k], y[places == k]) for k in places.unique()]


SPLITS = ("one client", "a label each", "one record and the rest", "at random")


def embedded(x: Tensor, y: Tensor, head: Tensor | None = None) -> EmbeddedTask:
    return EmbeddedTask(x, y, LABELS, head)


def method_with(**keys: object):
    return method_of(Experiment(method=MethodConfig.model_validate(keys)))


def statistics_in(method, name: str) -> Statistics:
    return {phase.name: phase.statistics for phase in method.phases}[name]


def name_vectors(task: str) -> Tensor:
    """What a model makes of the names of a task's labels."""
    return normalize(torch.randn(LABELS, SIZE, generator=seeded("names", task)), dim=1)


def known_of(tasks, deviation: float = 0.0, subspace: Subspace | None = None) -> SumContext:
    """What the server knows; without a subspace: all entries of a vector as they are."""
    names = {task: name_vectors(task) for task in tasks}
    return SumContext(deviation, names, subspace or principal(torch.zeros(1, SIZE), 0))


def class_totals(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Counts and sums of vectors, as they are without noise."""
    total = torch.zeros(LABELS, x.shape[1], dtype=torch.float64)
    return {
        COUNT: torch.bincount(y, minlength=LABELS).double(),
        SUM: total.index_add_(0, y, x.double()),
    }


def one_round(state: State, statistics: Statistics, tasks: dict[str, list[Data]]) -> State:
    """A round in which every client gives its exact sums; what they add up to is checked."""
    exact, totals = statistics.exact, {}
    assert exact is not None
    for task, clients in tasks.items():
        total = totals.setdefault(task, {})
        for x, y in clients:
            sums = exact.collect(embedded(x, y, state.heads.get(task)))
            expected = exact.shapes(LABELS, SIZE)
            assert {name: tuple(value.shape) for name, value in sums.items()} == dict(expected)
            for name, value in sums.items():
                total[name] = total.get(name, 0) + value
        exact.check(total)
    return statistics.absorb(state, totals, SumContext(0.0, {}, None))


def start() -> State:
    shapes = {"layer": (SIZE, SIZE)}
    return State(zero_adapter(shapes, 2, 1.0), zero_adapter(shapes, 2))
